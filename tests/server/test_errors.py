"""Which status and which words an exception becomes."""

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from bezel.engine.errors import (
    BezelError,
    ConfigError,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
)
from bezel.server.errors import (
    GenerationFailed,
    ModelNotFound,
    ReaderTooSlow,
    ShuttingDown,
    TooManyConnections,
    error_response,
    problem_of,
)


@pytest.mark.parametrize(
    ("error", "status", "type_", "code", "param"),
    [
        (InvalidRequest("m"), 400, "invalid_request_error", None, None),
        (InvalidRequest("m", "p", "c"), 400, "invalid_request_error", "c", "p"),
        (
            PromptTooLong(5, 6, 7),
            400,
            "invalid_request_error",
            "context_length_exceeded",
            "messages",
        ),
        (ModelNotFound("x"), 404, "invalid_request_error", "model_not_found", "model"),
        (Overloaded("m", 7), 429, "rate_limit_error", "slow_down", None),
        (
            Overloaded("m", 7, "rate_limit_exceeded"),
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
            None,
        ),
        (EngineUnavailable("m"), 503, "server_error", "server_is_overloaded", None),
        (ShuttingDown(), 503, "server_error", "server_is_overloaded", None),
        (TooManyConnections(5), 503, "server_error", "server_is_overloaded", None),
        (ReaderTooSlow(), 408, "invalid_request_error", "slow_reader", None),
        (GenerationFailed("m"), 500, "server_error", "generation_failed", None),
        (HTTPException(413, "m"), 413, "invalid_request_error", "request_too_large", None),
        (HTTPException(408, "m"), 408, "invalid_request_error", "request_timeout", None),
        (HTTPException(431, "m"), 431, "invalid_request_error", "headers_too_large", None),
        (HTTPException(418, "m"), 418, "invalid_request_error", None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_table(
    error: Exception, status: int, type_: str, code: str | None, param: str | None
) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.type, problem.code, problem.param) == (
        status,
        type_,
        code,
        param,
    )
    assert set(problem.as_object()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("error", [KeyError("secret"), BezelError("secret"), ConfigError("secret")])
def test_others_are_logged_and_hidden(error: Exception, caplog: Any) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.code) == (500, "internal_error")
    assert "secret" not in problem.message
    assert "secret" in caplog.text


def test_half_a_surrogate_pair_can_be_told_of() -> None:
    body = json.loads(bytes(error_response(ModelNotFound("\ud800"), "/v1/models").body))
    assert body["error"]["code"] == "model_not_found"


def test_when_to_come_back() -> None:
    assert problem_of(Overloaded("m", 7)).headers == {"Retry-After": "7"}
    assert problem_of(EngineUnavailable("m")).headers == {"Retry-After": "5"}
    assert problem_of(InvalidRequest("m")).headers == {}
    # And not to this connection.
    elsewhere = {"Retry-After": "5", "Connection": "close"}
    assert problem_of(ShuttingDown()).headers == elsewhere
    assert problem_of(TooManyConnections(5)).headers == elsewhere


@pytest.mark.parametrize(
    ("loc", "param"),
    [
        (("body", "messages", 2, "tool_calls", 0), "messages[2].tool_calls[0]"),
        (("body", "temperature"), "temperature"),
        (("body", "logit_bias", "x", "[key]"), "logit_bias"),
        (("body",), None),
    ],
    ids=str,
)
def test_validation_errors_name_the_field(loc: tuple[Any, ...], param: str | None) -> None:
    error = RequestValidationError([{"type": "x", "loc": loc, "msg": "Value error, is bad"}])
    problem = problem_of(error)
    assert (problem.status, problem.param) == (400, param)
    if param:
        assert problem.message == f"{param}: is bad."
