"""Every error a user can cause or see, in one tree.

    BezelError
    ├── InvalidRequest        the request is wrong                       → 400
    │   ├── PromptTooLong     the prompt leaves no room for an answer    → 400
    │   └── GrammarError      what the output must keep to can't be kept → 400
    ├── Overloaded            the queue, or a key's share of it, is full → 429
    ├── EngineUnavailable     the engine process died or is restarting   → 503
    └── ConfigError           a flag or the checkpoint is wrong          → start-up ends
        └── CheckpointError   the checkpoint can't be found, read or used

The HTTP layer turns them into status codes; nothing below it knows about HTTP.
"""


class BezelError(Exception):
    """Root of all errors with a message meant for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(BezelError):
    """A value in the request can't be served; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLong(InvalidRequest):
    """Prompt plus requested output don't fit `max_model_len` tokens."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
        wanted = f" and {max_tokens} output tokens" if max_tokens else ""
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the request "
            f"has {num_prompt_tokens} prompt tokens{wanted}.",
            param="messages",
            code="context_length_exceeded",
        )


class GrammarError(InvalidRequest):
    """A grammar or schema that can't be compiled, or costs too much."""


class Overloaded(BezelError):
    """There is no place for the request; try again after `retry_after_s` seconds.

    `code` tells clients whether all are too many ("slow_down"), or they alone are
    ("rate_limit_exceeded").
    """

    def __init__(self, message: str, retry_after_s: int, code: str = "slow_down") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code


class EngineUnavailable(BezelError):
    """The engine process isn't there to serve the request."""


class ConfigError(BezelError):
    """A setting can't work; the message says which and why."""


class CheckpointError(ConfigError):
    """The checkpoint is missing, damaged, or of a model Bezel doesn't know."""
