"""An answer on the terminal as it comes: thoughts dim, calls as `→ name(arguments)`.

Where nobody looks, as in a pipe, standard output gets what was said and called, and thoughts go to
standard error. What the model says can't control the terminal.
"""

from enum import Enum, auto
from typing import TextIO

_DIM, _CYAN, _RESET = "\x1b[2m", "\x1b[36m", "\x1b[0m"
# Escape sequences begin with these; line breaks and tabs may stay.
_CONTROLS = {c: "\ufffd" for c in (*range(0x20), *range(0x7F, 0xA0)) if c not in (9, 10)}


class Part(Enum):
    """What is being written."""

    THOUGHT = auto()
    CONTENT = auto()
    CALL = auto()


class Display:
    """Writes one answer after the other. `is_styled` is whether escape sequences may be used."""

    def __init__(self, out: TextIO, notes: TextIO, *, is_terminal: bool, is_styled: bool) -> None:
        self._out = out
        self._thoughts = out if is_terminal else notes
        self._is_terminal = is_terminal
        self._is_styled = is_styled
        self._part: Part | None = None
        self._at_line_start = True

    def thought(self, text: str) -> None:
        """More of a thought."""
        if self._begin(Part.THOUGHT) and not self._is_styled:
            self._write("[thinking]\n", self._thoughts)
        self._write(text, self._thoughts)

    def content(self, text: str) -> None:
        """More of what is said."""
        follows_thought = self._part is Part.THOUGHT and self._thoughts is self._out
        if follows_thought and not text.strip("\n"):
            return
        if self._begin(Part.CONTENT) and follows_thought:
            self._write("\n" if self._is_styled else "[answer]\n", self._out)
            text = text.lstrip("\n")
        self._write(text, self._out)

    def call(self, name: str, arguments: str) -> None:
        """More of a call: with a name it is a new one."""
        if name and self._part is Part.CALL:
            self._close()
        if self._begin(Part.CALL):
            self._write(f"→ {name}(", self._out)
        self._write(arguments, self._out)

    def end(self, note: str = "") -> None:
        """The answer is over; a note says why, if it isn't simply finished."""
        self._close()
        if note:
            self._thoughts.write(f"{self._style(_DIM)}[{note}]{self._style(_RESET)}\n")
        self._thoughts.flush()
        self._out.flush()

    def _begin(self, part: Part) -> bool:
        if self._part is part:
            return False
        self._close()
        self._part = part
        self._out.write(self._style({Part.THOUGHT: _DIM, Part.CALL: _CYAN}.get(part, "")))
        return True

    def _close(self) -> None:
        if self._part is None:
            return
        stream = self._thoughts if self._part is Part.THOUGHT else self._out
        if self._part is Part.CALL:
            self._write(")", stream)
        if self._part is not Part.CONTENT:
            self._out.write(self._style(_RESET))
        if not self._at_line_start:
            self._write("\n", stream)
        self._part, self._at_line_start = None, True

    def _write(self, text: str, stream: TextIO) -> None:
        if text:
            # First, as Ctrl-C may come as soon as there is something to see.
            self._at_line_start = text.endswith("\n")
            stream.write(text.translate(_CONTROLS) if self._is_terminal else text)
            stream.flush()

    def _style(self, sequence: str) -> str:
        return sequence if self._is_styled else ""
