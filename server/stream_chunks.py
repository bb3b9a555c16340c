"""Chunks of OpenAI's streams as our own clients read them, whatever a server sends instead."""

from typing import Any

import msgspec


class NotAChunk(Exception):
    """The message says why, and begins with what was read."""


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _CallPiece(msgspec.Struct):
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_CallPiece] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _PromptTokens(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptTokens | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None


def read_chunk(data: bytes) -> dict[str, Any]:
    """An event's data as an object, in which what clients look at is of its type, or null. Members
    of other names may be anything, and so may `error`.

    Raises:
        NotAChunk: it isn't one.
    """
    try:
        chunk = msgspec.json.decode(data)
        if not isinstance(chunk, dict):
            raise NotAChunk(f"{data!r:.100} is not an object of JSON")
        if not chunk.get("error"):
            msgspec.convert(chunk, _Chunk)
    except msgspec.ValidationError as error:
        raise NotAChunk(f"{data!r:.100} is no chunk: {error}") from None
    except (ValueError, RecursionError):
        raise NotAChunk(f"{data!r:.100} is not an object of JSON") from None
    return chunk


def choices_of(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a chunk; one with the usage has none."""
    return chunk.get("choices") or []
