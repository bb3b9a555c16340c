"""The tree of errors, and what the HTTP layer reads from each."""

import pytest

from bezel.engine.errors import (
    BezelError,
    CheckpointError,
    ConfigError,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
)


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (InvalidRequest, BezelError),
        (PromptTooLong, InvalidRequest),
        (Overloaded, BezelError),
        (EngineUnavailable, BezelError),
        (ConfigError, BezelError),
        (CheckpointError, ConfigError),
    ],
)
def test_tree(error: type[BezelError], parent: type[BezelError]) -> None:
    assert error.__bases__ == (parent,)


def test_message_is_what_is_printed() -> None:
    error = CheckpointError("no such file")
    assert (error.message, str(error)) == ("no such file", "no such file")


def test_invalid_request_names_the_field() -> None:
    error = InvalidRequest("n must be 1", param="n", code="unsupported_value")
    assert (error.message, error.param, error.code) == ("n must be 1", "n", "unsupported_value")
    assert (InvalidRequest("?").param, InvalidRequest("?").code) == (None, None)


def test_prompt_too_long_speaks_as_openai_does() -> None:
    error = PromptTooLong(num_prompt_tokens=9000, max_tokens=100, max_model_len=8192)
    assert error.message == (
        "This model's maximum context length is 8192 tokens, but the request has 9000 prompt "
        "tokens and 100 output tokens."
    )
    assert (error.param, error.code) == ("messages", "context_length_exceeded")


def test_prompt_too_long_without_a_wish_for_the_output() -> None:
    assert PromptTooLong(9, 0, 8).message.endswith("the request has 9 prompt tokens.")


def test_overloaded_says_when_to_come_back() -> None:
    error = Overloaded("the queue is full", retry_after_s=3)
    assert (error.message, error.retry_after_s) == ("the queue is full", 3)
