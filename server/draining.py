"""An orderly end: the first signal lets running requests finish, the second doesn't.

    signal ─▶ /ready says no ─▶ after `shutdown_grace` new requests are refused ─▶ the others
    finish, or get an error after `shutdown_timeout` ─▶ connections close
    second signal ─▶ the others get their error at once

The grace is for those in front, who go on sending requests until they have looked at /ready again.
Probes and /metrics are answered to the end.
"""

import asyncio
import logging
import signal
import socket
from contextvars import Context
from types import FrameType

import uvicorn

from bezel.server.errors import ShuttingDown
from bezel.server.state import ServerState

logger = logging.getLogger("bezel")

# What a response may still take once its generation has ended: the time to send some bytes.
_CLOSING_TIMEOUT_S = 5
# uvicorn would cancel what is left then, and say so with a traceback; nothing should be left.
UVICORN_TIMEOUT_S = _CLOSING_TIMEOUT_S + 5


class DrainingServer(uvicorn.Server):
    """uvicorn's server, with such an end."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def stop_if_failed(self, loading: asyncio.Task[None]) -> None:
        """End, if there is never going to be a model."""
        if not loading.cancelled() and loading.exception() is not None:
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Unlike uvicorn's, it doesn't keep the signal to raise it again in the end: being
        # asked to stop and having stopped is a success.
        if self._state.is_leaving:
            self.force_exit = self.should_exit = True
            return
        self._state.is_leaving = True
        # The signal interrupts some request, whose id isn't to be in the lines about this.
        nobodys = Context()
        nobodys.run(logger.info, "%s: finishing running requests", signal.Signals(sig).name)
        self._loop.call_soon_threadsafe(self._start_drain, context=nobodys)

    def _start_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        state = self._state
        if state.model is not None and state.config.shutdown_grace:
            await asyncio.sleep(state.config.shutdown_grace)
        state.is_draining = True
        try:
            await state.in_flight.wait_empty(state.config.shutdown_timeout)
        except TimeoutError:
            self._fail_all()
        self.should_exit = True

    def _fail_all(self) -> None:
        num = self._state.in_flight.fail_all(ShuttingDown())
        if num:
            logger.warning("ended %d requests that had not finished", num)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections, and cut off those whose clients don't let them be closed."""
        if self.force_exit:
            self._fail_all()
        closing = self._loop.call_later(_CLOSING_TIMEOUT_S, self._cut_off)
        await super().shutdown(sockets)
        closing.cancel()
        self._cut_off()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=1)

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
