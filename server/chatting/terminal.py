"""Where a prompt comes from, the command line, a pipe or somebody typing, and where answers go."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bezel.engine.errors import ConfigError
from bezel.server.chatting.display import Display


@dataclass(frozen=True, slots=True)
class Terminal:
    """Standard streams of this process. `prompt` is None if somebody types."""

    prompt: str | None
    display: Display

    @classmethod
    def of(cls, prompt: str | None, environ: Mapping[str, str]) -> "Terminal":
        """Read the prompt from standard input, unless it is given already or is to be typed.

        Raises:
            ConfigError: the prompt is empty, or isn't text.
        """
        if prompt is None and not (sys.stdin and sys.stdin.isatty()):
            try:
                prompt = sys.stdin.read().rstrip("\n") if sys.stdin else ""
            except UnicodeDecodeError:
                raise ConfigError("standard input isn't text") from None
        if prompt is not None and not prompt.strip():
            raise ConfigError("the prompt is empty")
        is_terminal = sys.stdout.isatty()
        wants_style = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
        display = Display(
            sys.stdout, sys.stderr, is_terminal=is_terminal, is_styled=is_terminal and wants_style
        )
        return cls(prompt, display)


def lines_of(sign: str, read_line: Callable[[str], str]) -> Iterator[str]:
    """What is typed, a line at a time without empty ones, until Ctrl-D; Ctrl-C empties a line."""
    while True:
        try:
            line = read_line(sign)
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit leaves")
            continue
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def type_line(sign: str) -> str:
    """A line from the keyboard, with the usual keys for editing where the system has them.

    Raises:
        EOFError: it is Ctrl-D.
    """
    try:
        import readline  # noqa: F401 - `input` uses it once it is imported
    except ImportError:
        pass
    return input(sign)
