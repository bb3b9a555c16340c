"""The known name that a mistyped one was probably meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: empty if nothing known is like it."""
    by_letters = {_letters(other): other for other in known}
    found = get_close_matches(_letters(name), by_letters, n=1)
    return f"; did you mean {by_letters[found[0]]}?" if found else ""


def _letters(name: str) -> str:
    """Without what all names of a kind begin with, which would make them alike."""
    return name.removeprefix("BEZEL_").lstrip("-/").replace("_", "-")
