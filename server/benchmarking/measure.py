"""One request as its client sees it: sent, read chunk by chunk, timed."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from bezel.server.stream_chunks import NotAChunk, choices_of, read_chunk

Message = dict[str, str]

_ERROR_LENGTH = 300
_SECONDS = re.compile(r"[0-9]{1,6}")


@dataclass(slots=True, kw_only=True)
class Measurement:
    """Seconds are of one monotonic clock. `late_s` is how long the request waited for others of
    this client before it was sent; no other time contains it. `retry_after_s` is what a server said
    that refused it."""

    sent_s: float
    ended_s: float = 0.0
    late_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] | None = None
    error: str | None = None
    detail: str = ""
    retry_after_s: int | None = None

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first chunk with text; None if there was none."""
        return self.chunk_times_s[0] - self.sent_s if self.chunk_times_s else None

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between chunks, which need not be tokens."""
        times = self.chunk_times_s
        return [later - earlier for earlier, later in pairwise(times)]

    @property
    def output_tokens(self) -> int:
        """As the server counted them, or else chunks."""
        counted = (self.usage or {}).get("completion_tokens")
        return len(self.chunk_times_s) if counted is None else counted

    @property
    def prompt_tokens(self) -> int | None:
        return (self.usage or {}).get("prompt_tokens")

    @property
    def cached_tokens(self) -> int | None:
        """Those of the prompt that the server's prefix cache had, if it says so."""
        details = (self.usage or {}).get("prompt_tokens_details") or {}
        cached: int | None = details.get("cached_tokens")
        return cached

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens: from the first chunk to the last over all tokens but one."""
        if self.output_tokens < 2 or not self.chunk_times_s:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.output_tokens - 1)


class _Failed(Exception):
    """The request has no answer that counts; `kind` is what failures are counted by."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Sends requests of one kind and times their answers."""

    client: httpx.AsyncClient
    endpoint: str
    model: str
    output_len: int
    ignore_eos: bool
    timeout_s: float
    clock: Callable[[], float]

    async def ask(self, messages: Sequence[Message]) -> Measurement:
        """Stream the answer to `messages`. What goes wrong is in `error`, never raised."""
        measured = Measurement(sent_s=self.clock())
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._stream(messages, measured)
        except TimeoutError:
            measured.error = "timeout"
        except httpx.HTTPError as error:
            measured.error, measured.detail = f"connection: {type(error).__name__}", str(error)
        except _Failed as error:
            measured.error, measured.detail = error.kind, error.detail[:_ERROR_LENGTH]
        measured.ended_s = self.clock()
        return measured

    async def _stream(self, messages: Sequence[Message], measured: Measurement) -> None:
        path, body = self._request(messages)
        async with self.client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                told = response.headers.get("retry-after", "")
                measured.retry_after_s = int(told) if _SECONDS.fullmatch(told) else None
                raise _Failed(f"HTTP {response.status_code}", response.text)
            is_done = False
            async for data in _events(response.aiter_bytes()):  # to its end, or it can't be reused
                is_done = is_done or data == b"[DONE]"
                if not is_done:
                    self._note(data, measured)
        if not is_done:
            raise _Failed("stream broken", "it ended without [DONE]")

    def _request(self, messages: Sequence[Message]) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.endpoint == "chat":
            return "/v1/chat/completions", {**body, "messages": list(messages)}
        prompt = "\n\n".join(message["content"] for message in messages)
        return "/v1/completions", {**body, "prompt": prompt}

    def _note(self, data: bytes, measured: Measurement) -> None:
        arrived_s = self.clock()
        try:
            chunk = read_chunk(data)
        except NotAChunk as error:
            raise _Failed("stream broken", str(error)) from None
        if chunk.get("error"):
            raise _Failed("error in the stream", str(chunk["error"]))
        measured.usage = chunk.get("usage") or measured.usage
        for choice in choices_of(chunk):
            delta = choice.get("delta") or {}
            content = choice.get("text") or delta.get("content") or ""
            measured.text += content
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            if content or thought or delta.get("tool_calls"):
                measured.chunk_times_s.append(arrived_s)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event, as soon as its line is whole; comments are left out.

    httpx would also end lines where JSON may have a U+2028.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()
