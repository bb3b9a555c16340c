"""How long an answer may take: by the server's settings, the request's body, and its header.

Whoever forwards requests, such as a gateway, knows how long it will wait and can't change the body;
so it may say so in `X-Request-Timeout`, in seconds. The shortest of the three counts.
"""

import math
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bezel.engine.errors import InvalidRequest
from bezel.server.errors import error_response

HEADER = "x-request-timeout"

# Seconds, of the HTTP request being served; None if its headers don't say.
header_timeout_s: ContextVar[float | None] = ContextVar("header_timeout_s", default=None)


class RequestTimeout:
    """Reads the header; refuses the request if it isn't a time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                header_timeout_s.set(_seconds(Headers(scope=scope).get(HEADER)))
            except InvalidRequest as error:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"{HEADER} must be a number of seconds above 0, got {text!r}.", HEADER)
    return seconds


def shortest_s(request_timeout_s: float, *timeouts_s: float | None) -> float:
    """The time that counts, in seconds: of the server, the header, and those of the body."""
    given = [seconds for seconds in timeouts_s if seconds is not None]
    asked = header_timeout_s.get()
    return min([request_timeout_s, *given, *([] if asked is None else [asked])])
