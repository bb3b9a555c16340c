"""Answers as server-sent events.

The status is decided by validation and admission, not by the first token: from then on the
connection is alive, with a comment line whenever nothing has come for a while, and an error
can only be told as an event.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Protocol

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from bezel.server.disconnect import unless_disconnected
from bezel.server.errors import ClientDisconnected, Problem, problem_of
from bezel.server.generation import Delta, Generation, TextRequest, generating
from bezel.server.state import ServerState

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# A comment: clients that follow the standard skip it, some stumble over ping events.
_KEEP_ALIVE = b": keep-alive\n\n"


class StreamedAnswer(Protocol):
    """An answer on its way out, as events of one API."""

    def begin(self) -> Iterator[bytes]:
        """What comes before anything is generated."""

    def events(self, delta: Delta) -> Iterator[bytes]:
        """What tells of a delta; nothing, if there is nothing to tell yet."""

    def end(self) -> Iterator[bytes]:
        """What comes after the last delta."""

    def failed(self, problem: Problem) -> bytes:
        """What comes instead, if there will be no last delta."""


class EventStream(StreamingResponse):
    """A streamed answer. Nothing is generated before it is sent, nor after the client left."""

    def __init__(
        self,
        state: ServerState,
        requests: Sequence[TextRequest],
        answer: StreamedAnswer,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__((), media_type="text/event-stream", headers={**_HEADERS, **headers})
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


async def events(
    generation: Generation, answer: StreamedAnswer, idle_s: float
) -> AsyncIterator[bytes]:
    """The events of a stream, from the first to the last or an error."""
    try:
        for event in answer.begin():
            yield event
        async for delta in generation.deltas(idle_s):
            if delta is None:
                yield _KEEP_ALIVE
                continue
            for event in answer.events(delta):
                yield event
    except Exception as error:
        yield answer.failed(problem_of(error))
        return
    for event in answer.end():
        yield event
