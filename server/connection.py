"""What one connection may take: time, bytes of headers, and a place among the others.

uvicorn's protocol for HTTP/1.1, with what it leaves to a proxy in front:

- A client that connects has `receive_timeout` seconds to send the head of a request, and as long
  again for each further piece of its body. Nobody can hold a connection by sending nothing.
- Headers are counted as they come. What is too much is neither kept nor waited for.
- Of a body whose request is answered already no more is read than `max_body_bytes`.
- A client that reads nothing of what it is sent for `send_timeout` seconds is cut off, which ends
  what is being generated for it.
- Beyond `max_connections` requests are refused, but for the probes.

Why each connection was closed is counted.
"""

import asyncio
import logging
import sys
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import httptools
import msgspec
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from bezel.engine.metric_families import ConnectionEnd
from bezel.engine.metrics import Metrics
from bezel.server.auth import PUBLIC_PATHS
from bezel.server.config import ServerConfig
from bezel.server.errors import TooManyConnections, error_response, problem_of

logger = logging.getLogger("bezel")

_MAX_HEADERS = 256
# So many more than `max_connections` are told that there are too many; the others are cut off.
_NUM_TOLD = 128
# Where a connection tells the app of a request that it must refuse.
_REFUSAL = "bezel.refusal"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Times in seconds, sizes in bytes."""

    max_connections: int
    max_header_bytes: int
    max_body_bytes: int
    receive_timeout_s: float
    send_timeout_s: float
    request_timeout_s: float

    @classmethod
    def of(cls, config: ServerConfig) -> "ConnectionLimits":
        return cls(
            max_connections=config.max_connections,
            max_header_bytes=config.max_header_bytes,
            max_body_bytes=config.max_body_bytes,
            receive_timeout_s=config.receive_timeout,
            send_timeout_s=config.send_timeout,
            request_timeout_s=config.request_timeout,
        )


class LimitedConnection(HttpToolsProtocol):
    """One connection of a client."""

    def __init__(self, *args: Any, limits: ConnectionLimits, metrics: Metrics, **more: Any) -> None:
        super().__init__(*args, **more)
        self._limits = limits
        self._metrics = metrics
        self._end: ConnectionEnd | None = None
        self._receive_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._num_unsent_bytes = 0
        self._served: RequestResponseCycle | None = None
        # Of the message that is coming in.
        self._is_in_head = False
        self._num_head_bytes = 0
        self._began_s = 0.0
        self._num_unwanted_bytes = 0
        # Since the parser has last told of anything: one long header, or what goes between chunks.
        self._num_silent_bytes = 0
        self._newest = b""
        self._is_resuming = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._metrics.observe_connections(len(self.connections))
        if len(self.connections) > self._limits.max_connections + _NUM_TOLD:
            self._end_by(ConnectionEnd.MAX_CONNECTIONS)
            transport.abort()
            return
        # What the system doesn't take is for a client that doesn't read: no more is to be added.
        transport.set_write_buffer_limits(high=0)
        self._await_client()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_by(ConnectionEnd.SERVER if exc is None else ConnectionEnd.CLIENT)
        assert self._end is not None
        self._metrics.observe_connection_end(self._end)
        self._metrics.observe_connections(len(self.connections))
        if self._served is not None and not self._served.response_complete:
            # If the client had sent a further request, uvicorn has told that one alone.
            self._served.disconnected = True
            self._served.message_event.set()
        self._stop_waiting()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def eof_received(self) -> None:
        self._end_by(ConnectionEnd.CLIENT)
        super().eof_received()

    def _end_by(self, end: ConnectionEnd) -> None:
        """Note why it ends, unless that is known already."""
        self._end = self._end or end

    def data_received(self, data: bytes) -> None:
        self._num_silent_bytes += len(data)
        self._newest = data
        super().data_received(data)
        if self.transport.is_closing():
            return
        is_too_large = self._is_in_head and self._is_head_too_large
        if is_too_large or self._num_silent_bytes > self._limits.max_header_bytes:
            self._refuse(431, self._too_large, ConnectionEnd.MAX_HEADER_BYTES)
        elif self._is_clients_turn:
            if self._receive_timer is None or self._is_in_body:
                self._await_client()
        else:
            self._stop_waiting()

    @property
    def _is_in_body(self) -> bool:
        cycle = self.cycle
        return cycle is not None and cycle.more_body and not cycle.response_complete

    @property
    def _is_clients_turn(self) -> bool:
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    @property
    def _is_head_too_large(self) -> bool:
        is_long = self._num_head_bytes > self._limits.max_header_bytes
        return is_long or len(self.headers) > _MAX_HEADERS

    @property
    def _too_large(self) -> str:
        limit = self._limits.max_header_bytes
        return f"The headers are larger than {limit} bytes, or more than {_MAX_HEADERS}."

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    # The parser calls these.

    def on_message_begin(self) -> None:
        if self._is_resuming:
            return
        super().on_message_begin()
        self._is_in_head = True
        self._num_head_bytes = self._num_silent_bytes = self._num_unwanted_bytes = 0
        self._began_s = self.loop.time()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        if not self._is_resuming and not self._is_head_too_large:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        # Those after the body are nothing that a request may bring.
        if self._is_in_head and not self._is_head_too_large:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_silent_bytes = 0
        if self._is_resuming:
            self._is_resuming = False
            return
        if self._is_head_too_large:
            # The URL may be cut off; what becomes of the request doesn't depend on it any more.
            self.url = b"/"
            self._have_refused(HTTPException(431, self._too_large, {"Connection": "close"}))
            self._end_by(ConnectionEnd.MAX_HEADER_BYTES)
        elif len(self.connections) > self._limits.max_connections and not self._is_probe:
            self._have_refused(TooManyConnections(self._limits.max_connections))
            self._end_by(ConnectionEnd.MAX_CONNECTIONS)
        self._is_in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_silent_bytes = 0
        if self.cycle.response_complete:
            # Many clients read the answer only after all is sent; a reset would keep it from them.
            self._num_unwanted_bytes += len(body)
            if self._num_unwanted_bytes > self._limits.max_body_bytes:
                self._end_by(ConnectionEnd.MAX_BODY_BYTES)
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_silent_bytes = 0
        super().on_message_complete()

    def _count(self, num_bytes: int) -> None:
        self._num_silent_bytes = 0
        self._num_head_bytes += num_bytes

    @property
    def _is_probe(self) -> bool:
        return self.url.partition(b"?")[0].decode("latin-1") in PUBLIC_PATHS

    def _have_refused(self, error: Exception) -> None:
        self.scope["extensions"] = {_REFUSAL: error}  # type: ignore[dict-item]

    # Waiting for the client.

    def _await_client(self) -> None:
        self._stop_waiting()
        seconds = self._limits.receive_timeout_s
        if self._is_in_body:
            left_s = self._began_s + self._limits.request_timeout_s - self.loop.time()
            seconds = max(0.0, min(seconds, left_s))
        self._receive_timer = self.loop.call_later(seconds, self._on_receive_timeout)

    def _stop_waiting(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _on_receive_timeout(self) -> None:
        self._receive_timer = None
        if self.transport.is_closing() or not self._is_clients_turn:
            return
        if self.flow.read_paused:
            self._await_client()  # it can't send: what has come is yet to be taken
        elif self._is_in_head or self._is_in_body:
            self._refuse(408, "The request didn't come in time.", ConnectionEnd.RECEIVE_TIMEOUT)
        else:
            self._end_by(ConnectionEnd.RECEIVE_TIMEOUT)
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self._end_by(ConnectionEnd.TIMEOUT_KEEP_ALIVE)
        super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _await_reader(self) -> None:
        self._num_unsent_bytes = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(self._limits.send_timeout_s, self._on_send_timeout)

    def _on_send_timeout(self) -> None:
        if 0 < self.transport.get_write_buffer_size() < self._num_unsent_bytes:
            self._await_reader()  # it reads, if slowly
            return
        logger.info(
            "closed a connection: its client read nothing for %g s", self._limits.send_timeout_s
        )
        self._end_by(ConnectionEnd.SEND_TIMEOUT)
        self.transport.abort()

    # Answers without the app.

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, for what isn't HTTP, in the words of the API."""
        self._refuse(400, msg, ConnectionEnd.MALFORMED)

    def _unsupported_upgrade_warning(self) -> None:
        """Go on as if nobody had asked for another protocol, which a server may (RFC 9110, 7.8).

        Java's client asks for HTTP/2 with every first request. The parser has stopped after the
        head and takes the rest for that protocol; a new one is told of a body, and goes on.
        """
        upgrade = sys.exception()
        assert isinstance(upgrade, httptools.HttpParserUpgrade)
        rest = self._newest[upgrade.args[0] :]
        framing = [
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        self.parser = httptools.HttpRequestParser(self)
        if framing:
            self.cycle.more_body = True
            self._is_resuming = True
            rest = b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n" + rest
        if rest:
            super().data_received(rest)

    def _refuse(self, status: int, message: str, end: ConnectionEnd) -> None:
        """Answer a request that hasn't come to its end, and close."""
        self._end_by(end)
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.abort()
            return
        problem = problem_of(HTTPException(status, message))
        body = msgspec.json.encode(problem.as_object())
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def limited_protocol(config: ServerConfig, metrics: Metrics) -> type[asyncio.Protocol]:
    """What `uvicorn.Config` takes as `http`: connections with the limits of the settings."""
    factory = partial(LimitedConnection, limits=ConnectionLimits.of(config), metrics=metrics)
    return cast(type[asyncio.Protocol], factory)


class ConnectionRefusals:
    """Answers requests that their connection has refused, as plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = scope.get("extensions", {}).get(_REFUSAL)
        app = self._app if refusal is None else error_response(refusal, scope["path"])
        await app(scope, receive, send)
