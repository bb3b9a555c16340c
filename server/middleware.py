"""What every HTTP request goes through before it is routed, as plain ASGI.

Outermost first: `RequestContext` (ids, log, metrics, last resort for errors), CORS if it is
asked for, `connection.ConnectionRefusals`, `auth.ApiKey`, `deadlines.RequestTimeout`,
`admission.AdmissionGate`, `BodyLimit`. None of them buffers anything, so streams and disconnects
pass unhindered.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bezel.engine.metrics import Metrics
from bezel.server.auth import tenant
from bezel.server.errors import error_response
from bezel.server.logs import PROBES, log_request
from bezel.server.request_id import set_request_id, set_trace_id, trace_id
from bezel.server.request_summary import RequestSummary, begin_summary
from bezel.server.tracing import Tracing

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestContext:
    """Gives the request an id, answers for errors that nobody handled, and tells of its end: once,
    to the metrics, in the log and as a span."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None, logs_requests: bool
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._logs_requests = logs_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = set_request_id(headers.get("x-request-id", ""))
        set_trace_id(headers.get("traceparent", ""))
        summary = begin_summary(_method(scope))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                summary.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with self._span(scope["path"], headers, summary):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                if summary.status is not None:
                    summary.error = "internal_error"
                    raise
                await error_response(error, scope["path"])(scope, receive, send_with_id)
            finally:
                summary.route = _route(scope)
                self._tell_end(summary)

    @contextmanager
    def _span(self, path: str, headers: Headers, summary: RequestSummary) -> Iterator[None]:
        """The request's span around a block; its trace's id is in every line of the log."""
        if self._tracing is None or path in PROBES:
            yield
            return
        span = self._tracing.begin(summary.method, headers)
        trace_id.set(format(span.get_span_context().trace_id, "032x"))
        try:
            yield
        finally:
            self._tracing.end(span, summary)

    def _tell_end(self, summary: RequestSummary) -> None:
        summary.ended_s = time.monotonic()
        summary.key = tenant.get().removeprefix("key ") or None
        status = summary.status or 500
        self._metrics.observe_http(summary.method, summary.route, status, summary.total_s)
        if self._logs_requests:
            log_request(summary)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


def _route(scope: Scope) -> str:
    """The template of the route, never the path: clients must not be able to make up labels."""
    route = scope.get("route") or _matching_route(scope)
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "unmatched"


def _matching_route(scope: Scope) -> BaseRoute | None:
    """Where a request would have gone that was refused on its way there."""
    routes: Sequence[BaseRoute] = scope["app"].routes
    return next((r for r in routes if r.matches(scope)[0] is not Match.NONE), None)


class BodyLimit:
    """Refuses bodies above a size, before reading them where the client declares it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await error_response(self._too_large(), scope["path"])(scope, receive, send)
            return
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is larger than {self._max_bytes} bytes.")
