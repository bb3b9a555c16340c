"""Traces: a request a line as JSON, whose texts are named and measured instead of spelled out.

    {"id": "a", "arrival_s": 0.5, "prompt": [["rules", 400], ["hi", 9]], "num_output_tokens": 80}
    {"arrival_s": 1.25, "prompt_tokens": 512, "num_output_tokens": 64}
    {"after": "a", "think_s": 9, "prompt": [["rules", 400], ["hi", 9], ["output:a", 80],
                                            ["more", 12]], "num_output_tokens": 60}

Token *i* of a text follows from its name and *i* alone, so that prompts which begin with the same
texts begin with the same tokens, and the prefix cache finds them.
"""

from collections.abc import Callable, Iterable, Iterator
from hashlib import shake_128
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from bezel.engine.errors import ConfigError

_Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Seconds = Annotated[float, Meta(ge=0)]


class TraceRequest(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One line. Of the three forms of a prompt exactly one is given.

    `arrival_s` counts from the start of the trace; left out, it is that of the line before. With
    `after` the request also waits for that one's end and `think_s` seconds more. `deadline_s` after
    its arrival it is given up. The invented output of request *x* is the text named `output:x`. The
    rest is as in `SamplingParams`.
    """

    id: str | None = None
    arrival_s: _Seconds | None = None
    after: str | None = None
    think_s: _Seconds = 0.0
    prompt: Annotated[list[tuple[str, _Length]], Meta(min_length=1)] | None = None
    prompt_tokens: _Length | None = None
    prompt_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    num_output_tokens: _Length
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    tenant: str = ""
    cache_salt: str = ""
    num_preamble_tokens: Annotated[int, Meta(ge=0)] = 0
    deadline_s: Annotated[float, Meta(gt=0)] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        if self.prompt is not None:
            return sum(length for _, length in self.prompt)
        return self.prompt_tokens or len(self.prompt_token_ids or ())

    def prompt_ids(self, index: int) -> list[int]:
        """The prompt of the trace's request number `index`: invented tokens, below 256."""
        if self.prompt_token_ids is not None:
            return list(self.prompt_token_ids)
        texts = self.prompt or [(f"prompt of request {index}", self.prompt_tokens or 0)]
        return list(b"".join(tokens_of(name, length) for name, length in texts))

    def output_ids(self, index: int) -> bytes:
        """The tokens that the model is taken to answer."""
        name = f"output of request {index}" if self.id is None else f"output:{self.id}"
        return tokens_of(name, self.num_output_tokens)


def tokens_of(name: str, num_tokens: int) -> bytes:
    """The first tokens of the text of that name.

    Bytes, for as members of lists they take no memory of their own; 64 of them are as good as
    unique.
    """
    return shake_128(name.encode()).digest(num_tokens)


def read_trace(path: Path) -> Iterator[TraceRequest]:
    """The file's lines, read as they are wanted.

    Raises:
        ConfigError: the file can't be read, or a line is wrong; it names the line and the field.
    """
    decode = msgspec.json.Decoder(TraceRequest).decode
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield _parse(line, number, decode)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """Write requests as they pass through.

    Raises:
        ConfigError: the file can't be written.
    """
    encode = msgspec.json.Encoder().encode
    try:
        with path.open("wb") as lines:
            for request in requests:
                lines.write(encode(request) + b"\n")
                yield request
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def trace_error(number: int, problem: str) -> ConfigError:
    """What is wrong with a line, for the user; lines count from 1."""
    return ConfigError(f"line {number} of the trace: {problem}")


def _parse(line: bytes, number: int, decode: Callable[[bytes], TraceRequest]) -> TraceRequest:
    try:
        request = decode(line)
    except msgspec.DecodeError as error:
        problem, _, place = str(error).partition(" - at `$.")
        raise trace_error(number, f"{place[:-1]}: {problem}" if place else problem) from None
    forms = (request.prompt, request.prompt_tokens, request.prompt_token_ids)
    if sum(form is not None for form in forms) != 1:
        raise trace_error(number, "prompt: give one of prompt, prompt_tokens, prompt_token_ids")
    return request
