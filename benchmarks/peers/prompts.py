"""Prompts of an exact number of tokens, of sentences that come with Python.

A server must make the same tokens of the text, so a text counts only if it has the wanted number
when it is encoded again. Lengths include <bos>.
"""

import pydoc_data.topics
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]

_MARK_UP = re.compile(r"===|\*\*\*|[|<>]")
_MAX_TRIES = 100


def sentences() -> list[str]:
    """Of the help texts of `pydoc`: English, with some code in it."""
    text = " ".join(pydoc_data.topics.topics.values())
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)]
    return [part for part in found if 40 < len(part) < 300 and not _MARK_UP.search(part)]


@dataclass(frozen=True, slots=True)
class Writer:
    """Makes prompts; every one begins with another sentence than the others, or nearly so."""

    encode: Encode  # puts <bos> in front
    decode: Decode  # leaves it out
    random: Random
    sentences: list[str]

    def write(self, num_tokens: int, beginning: str = "") -> str:
        """A text of `num_tokens` tokens, whose first ones are those of `beginning`."""
        fixed = self.encode(beginning) if beginning else []
        for _ in range(_MAX_TRIES):
            text = f"{beginning} {self._long(num_tokens)}" if fixed else self._long(num_tokens)
            ids = self.encode(text)[:num_tokens]
            text = self.decode(ids)
            if self.encode(text) == ids and ids[: len(fixed)] == fixed:
                return text
        raise AssertionError(f"no text of {num_tokens} tokens that encodes to itself")

    def _long(self, num_tokens: int) -> str:
        """So many words or more, each of which is a token or more."""
        chosen, num_words = [], 0
        while num_words < num_tokens:
            chosen.append(self.random.choice(self.sentences))
            num_words += len(chosen[-1].split())
        return " ".join(chosen)


def lone(writer: Writer, num: int, num_tokens: int) -> list[str]:
    """Prompts that have nothing in common."""
    return [writer.write(num_tokens) for _ in range(num)]


def sharing(writer: Writer, num: int, prefix_tokens: int, own_tokens: int) -> list[str]:
    """Prompts whose first `prefix_tokens` are the same."""
    prefix = writer.write(prefix_tokens)
    return [writer.write(prefix_tokens + own_tokens, prefix) for _ in range(num)]
