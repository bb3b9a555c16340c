"""The wire types of requests: which fields there are, and their JSON types.

Ranges are checked where values are used (`SamplingParams.validate`); null always means
"not given". Fields that aren't declared here end up in `model_extra`, and
`server.unsupported` decides what to say of them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_MAX_STOP_STRINGS = 4


def _as_stop_strings(value: Any) -> Any:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > _MAX_STOP_STRINGS or "" in strings:
        raise ValueError(f"must be a string or up to {_MAX_STOP_STRINGS} of them, none empty")
    return strings


def _as_prompts(value: Any) -> Any:
    """One prompt or several, as text or as token ids → always several."""
    prompts = [value] if isinstance(value, str) or _is_token_ids(value) else value
    if isinstance(prompts, list) and prompts:
        if all(isinstance(prompt, str) for prompt in prompts):
            return prompts
        if all(_is_token_ids(prompt) for prompt in prompts):
            return prompts
    raise ValueError(
        "must be a string, a list of strings, a list of token ids, or a list of such lists"
    )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


StopStrings = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_stop_strings, json_schema_input_type=str | list[str] | None),
]
Prompts = Annotated[
    list[str] | list[list[int]],
    BeforeValidator(
        _as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]


class StreamOptions(BaseModel):
    """How a stream is to be sent."""

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both generating routes understand."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: StopStrings = ()
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens


class ChatMessage(BaseModel):
    """One turn; `content` is text or a list of parts, which `server.chat` looks into."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def output_limit(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
