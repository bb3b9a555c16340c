"""From an exception to OpenAI's error object: one table for every status.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Used for whole responses and for error events inside a stream alike; under /v1/messages the same
is told in Anthropic's words. Exceptions that aren't
in the table are ours: they are logged with their traceback and told as a bare 500.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bezel.engine.errors import BezelError, EngineUnavailable, InvalidRequest, Overloaded
from bezel.server.request_id import request_id
from bezel.server.request_summary import current_summary

logger = logging.getLogger("bezel")

# A restart or the end of loading takes about this long; clients may ask again then.
_UNAVAILABLE_RETRY_AFTER_S = 5


class ModelNotFound(InvalidRequest):
    """The request names a model that isn't served here."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The model {name!r} is not served here.", "model", "model_not_found")


class GenerationFailed(BezelError):
    """The engine gave up on a sequence."""


class DeadlineExceeded(BezelError):
    """The answer took longer than the request, or the server, allows."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"The answer was not finished within {timeout_s:g} s.")


class ShuttingDown(EngineUnavailable):
    """The server takes no new requests."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down.")


class TooManyConnections(BezelError):
    """All connections there may be are open."""

    def __init__(self, max_connections: int) -> None:
        super().__init__(f"The server has {max_connections} connections already.")


class ReaderTooSlow(BezelError):
    """The client leaves so much of its stream unread that the answer was given up."""

    def __init__(self) -> None:
        super().__init__("The stream was read too slowly; the rest of the answer was given up.")


class ClientDisconnected(Exception):
    """Nobody is there to read the answer; what was running for it has been aborted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A status and the fields of OpenAI's error object."""

    status: int
    type: str
    code: str | None
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def as_object(self, path: str = "") -> dict[str, Any]:
        """The body, in the form that clients of the route at `path` expect."""
        # It may quote half of a surrogate pair, which JSON can spell and UTF-8 can't hold.
        message = self.message.encode("utf-8", "replace").decode()
        if path.startswith("/v1/messages"):
            type_ = _ANTHROPIC_TYPES.get(self.status, "api_error")
            told = {"type": type_, "message": message}
            return {"type": "error", "error": told, "request_id": request_id.get()}
        fields = {"message": message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}


_BY_CLASS: dict[type[BezelError], tuple[int, str, str | None]] = {
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    InvalidRequest: (400, "invalid_request_error", None),
    Overloaded: (429, "rate_limit_error", "slow_down"),
    EngineUnavailable: (503, "server_error", "server_is_overloaded"),
    TooManyConnections: (503, "server_error", "server_is_overloaded"),
    ReaderTooSlow: (408, "invalid_request_error", "slow_reader"),
    GenerationFailed: (500, "server_error", "generation_failed"),
    DeadlineExceeded: (504, "server_error", "deadline_exceeded"),
}
_BY_STATUS: dict[int, str] = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    431: "headers_too_large",
}


_ANTHROPIC_TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    431: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def problem_of(error: Exception) -> Problem:
    """Tell any exception in the client's terms; logs those that nobody foresaw."""
    problem = _problem_of(error)
    current_summary().error = problem.code or problem.type
    return problem


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, RequestValidationError):
        return _validation_problem(error)
    if isinstance(error, HTTPException):
        code = _BY_STATUS.get(error.status_code)
        headers = error.headers or {}
        return Problem(
            error.status_code, "invalid_request_error", code, error.detail, headers=headers
        )
    for cls in type(error).__mro__:
        if isinstance(error, BezelError) and cls in _BY_CLASS:
            return _bezel_problem(error, *_BY_CLASS[cls])
    logger.error("unexpected error while serving a request", exc_info=error)
    message = f"The server made a mistake; its log has more on request {request_id.get()}."
    return Problem(500, "server_error", "internal_error", message)


def _bezel_problem(error: BezelError, status: int, type_: str, code: str | None) -> Problem:
    if isinstance(error, InvalidRequest):
        return Problem(status, type_, error.code or code, error.message, error.param)
    headers = {}
    if isinstance(error, DeadlineExceeded):
        # OpenAI's clients would try twice more, each time for as long.
        headers["x-should-retry"] = "false"
    if isinstance(error, Overloaded):
        code = error.code
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, EngineUnavailable | TooManyConnections):
        headers["Retry-After"] = str(_UNAVAILABLE_RETRY_AFTER_S)
    if isinstance(error, ShuttingDown | TooManyConnections):
        # The next request of this client had better go elsewhere.
        headers["Connection"] = "close"
    return Problem(status, type_, code, error.message, headers=headers)


def _validation_problem(error: RequestValidationError) -> Problem:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"The body is not valid JSON: {first['ctx']['error']}."
        return Problem(400, "invalid_request_error", None, message)
    path = first["loc"][1:]
    if not path:
        message = "The body must be a JSON object, sent as application/json."
        return Problem(400, "invalid_request_error", None, message)
    # Deeper parts of a path are the reader's own only in messages; elsewhere they may name
    # alternatives of a type.
    param = _join_path(path) if path[0] == "messages" else str(path[0])
    message = f"{param}: {first['msg'].removeprefix('Value error, ')}."
    return Problem(400, "invalid_request_error", None, message, param)


def _join_path(path: tuple[str | int, ...]) -> str:
    """("messages", 0, "role") → "messages[0].role"."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response with a JSON body."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(error: Exception, path: str) -> Response:
    """The whole response that tells the client of an error on a path."""
    problem = problem_of(error)
    return json_response(problem.as_object(path), problem.status, problem.headers)


async def handle_error(request: Request, error: Exception) -> Response:
    """The exception handler of every route."""
    if isinstance(error, ClientDisconnected):
        # Nobody reads it; the status is for the metrics, as nginx has it.
        return Response(status_code=499)
    return error_response(error, request.url.path)
