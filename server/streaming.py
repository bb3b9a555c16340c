"""Answers as server-sent events.

The status is decided by validation and admission, not by the first token: from then on the
connection is alive, with a comment line whenever nothing has come for a while, and an error
can only be told as an event.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bezel.server.disconnect import unless_disconnected
from bezel.server.errors import ClientDisconnected, problem_of
from bezel.server.generation import Generation, TextRequest, generating
from bezel.server.responses import Answer
from bezel.server.state import ServerState

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_DONE = b"data: [DONE]\n\n"
# A comment: clients that follow the standard skip it, some stumble over ping events.
_KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(StreamingResponse):
    """A streamed answer. Nothing is generated before it is sent, nor after the client left."""

    def __init__(self, state: ServerState, requests: Sequence[TextRequest], answer: Answer) -> None:
        super().__init__((), media_type="text/event-stream", headers=_HEADERS)
        self._state = state
        self._requests = requests
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with generating(self._state, self._requests) as generation:
            idle_s = self._state.config.sse_keep_alive_interval
            self.body_iterator = events(generation, self._answer, idle_s)
            try:
                await unless_disconnected(receive, self.stream_response(send))
            except ClientDisconnected:
                return


async def events(generation: Generation, answer: Answer, idle_s: float) -> AsyncIterator[bytes]:
    """The events of a stream, from the first chunk to [DONE] or an error."""
    try:
        async for delta in generation.deltas(idle_s):
            if delta is None:
                yield _KEEP_ALIVE
                continue
            for chunk in answer.chunks(delta):
                yield _event(chunk)
    except Exception as error:
        yield _event(problem_of(error).as_object())
        return
    if answer.include_usage:
        yield _event(answer.usage_chunk())
    yield _DONE


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
