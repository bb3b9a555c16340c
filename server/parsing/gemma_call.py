"""Calls of tools as Gemma writes them → names and JSON arguments, piece by piece.

    call:NAME{k:<|"|>v<|"|>,n:42,b:true}   ─▶   NAME, {"k":"v","n":42,"b":true}

The text between `<|tool_call>` and `<tool_call|>` comes in pieces, the quote token `<|"|>` as a
call of `quote`: a `"` is an ordinary character of a string. However the text is cut, the pieces of
JSON add up to the same. Models stray from the syntax; this is understood too:

    :NAME{…}  NAME{…}  call NAME{…}         "call:" or a part of it left out
    call:NAME                               no arguments
    call:NAME({…})  call:NAME(k=1)          parentheses, which may hold an object
    call:NAME{{…}}                          doubled braces: histories show them if arguments are
                                            given to the template as text
    {"name":"NAME","arguments":{…}}         JSON, also with "parameters"
    {"k":"v",'k':'v'}                       ordinary quotes around keys and strings
    {k:True,l:None}                         Python's words
    {k:Paris}                               a word that is no JSON: a string
    {k:<|"|>v<|"|>n:1}  {k:1,}              commas missing or too many
    {k}  {k:}                               values missing: null
    {k:[1,2}  {k:<|"|>v                     what is open when the call ends is closed
    call:F{…}call:G{…}                      several calls in one

Names are what OpenAI lets a function be called: a client could not send others back to us.
"""

import json
import re
from dataclasses import dataclass, field

from bezel.server.parsing.gemma_arguments import ArgumentsReader

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADER = re.compile(
    r"\s*(?P<call>call\s*[:\s]|:)?\s*"
    rf"(?P<quote>[\"']?)(?P<name>{_NAME.pattern})(?P=quote)\s*"
)
# What may still become a header.
_BEGINNING = re.compile(
    r"\s{0,9}(?:call\s{0,9}[:\s]|:)?\s{0,9}[\"']?[A-Za-z0-9_-]{0,64}[\"']?\s{0,9}"
)
# What a call may leave behind: closers too many, and what stands between calls.
_REMAINS = " \t\r\n,;)]}"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of a call; `name` comes with its first piece only."""

    name: str | None
    arguments: str


class CallReader:
    """Reads what stands between `<|tool_call>` and `<tool_call|>`.

    `rejected` is text that turned out not to be a call, after which nothing more is read.
    """

    def __init__(self) -> None:
        self._header = ""
        self._after_call = False
        self._arguments: ArgumentsReader | None = None
        self._json_call: _JsonCall | None = None
        self.rejected: str | None = None

    def read(self, text: str) -> list[CallPiece]:
        """Further text."""
        pieces: list[CallPiece] = []
        position = 0
        while position < len(text) and self.rejected is None:
            if self._arguments is None:
                position = self._read_header(text, position, pieces)
            else:
                end = self._arguments.read(text, position)
                if self._json_call is not None:
                    self._json_call.source.append(text[position:end])
                self._take(pieces)
                position = end
        if self.rejected is not None:
            self.rejected += text[position:]
        return pieces

    def quote(self) -> list[CallPiece]:
        """The quote token."""
        if self._arguments is None:
            return self.read('"')
        pieces: list[CallPiece] = []
        self._arguments.quote()
        if self._json_call is not None:
            self._json_call.source.append('"')
        self._take(pieces)
        return pieces

    def close(self) -> list[CallPiece]:
        """The end of the call: by its token, or because the model went on to something else."""
        pieces: list[CallPiece] = []
        if self._arguments is not None:
            self._arguments.finish()
            self._take(pieces)
        elif match := _HEADER.fullmatch(self._header):
            if match["call"]:
                pieces.append(CallPiece(match["name"], "{}"))
            else:
                self.rejected = self._header
        elif self._header.strip():
            self.rejected = self._header
        return pieces

    def cut(self) -> list[CallPiece]:
        """The end of the output within the call: what isn't complete stays so.

        A name that may lack its end is worth nothing, and neither is it text for people.
        """
        if self._after_call and not self._header.startswith(("call", ":")):
            self.rejected = self._header
        return []

    def _read_header(self, text: str, position: int, pieces: list[CallPiece]) -> int:
        """One character of what stands before arguments."""
        char = text[position]
        if self._after_call and not self._header and char in _REMAINS:
            return position + 1
        if char in "{(" and self._begin_arguments(char, pieces):
            return position + 1
        if not _BEGINNING.fullmatch(self._header + char):
            self.rejected = self._header
            return position
        self._header += char
        return position + 1

    def _begin_arguments(self, opener: str, pieces: list[CallPiece]) -> bool:
        if match := _HEADER.fullmatch(self._header):
            self._arguments = ArgumentsReader(opener)
            pieces.append(CallPiece(match["name"], self._arguments.take()))
            return True
        if opener == "{" and not self._header.strip():
            self._arguments = ArgumentsReader()
            self._json_call = _JsonCall([self._header + opener])
            return True
        return False

    def _take(self, pieces: list[CallPiece]) -> None:
        """What the arguments have become, and what follows if they are complete."""
        assert self._arguments is not None
        arguments = self._arguments.take()
        if self._json_call is not None:
            self._json_call.json.append(arguments)
        elif arguments:
            pieces.append(CallPiece(None, arguments))
        if not self._arguments.is_complete:
            return
        if self._json_call is not None:
            call = self._json_call.understood()
            if call is None:
                self.rejected = "".join(self._json_call.source)
            else:
                pieces.append(call)
        self._arguments = self._json_call = None
        self._header = ""
        self._after_call = True


@dataclass(slots=True)
class _JsonCall:
    """A call that is an object itself: as the model wrote it, and as JSON."""

    source: list[str]
    json: list[str] = field(default_factory=list)

    def understood(self) -> CallPiece | None:
        try:
            call = json.loads("".join(self.json))
            arguments = call.get("arguments", call.get("parameters"))
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            name = call.get("name")
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                return None
            if not isinstance(arguments, dict):
                return None
            text = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            text.encode()  # half of a surrogate pair can be spelled, but not sent
        except (ValueError, RecursionError):
            return None
        return CallPiece(name, text)
