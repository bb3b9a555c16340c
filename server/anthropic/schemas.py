"""The wire types of Anthropic's Messages API: which fields a request has, and their JSON types."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class CacheControl(BaseModel):
    """Accepted everywhere and without effect: what can be cached is found without being told."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: str


class _Block(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    cache_control: CacheControl | None = None


class TextBlock(_Block):
    """Text of either side."""

    type: Literal["text"]
    text: str


def _as_blocks(value: Any) -> Any:
    """A string stands for one block of text."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


TextBlocks = Annotated[
    list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])
]


class ThinkingBlock(_Block):
    """What the model thought in an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(_Block):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Block):
    """What a call gave, in a message of the user's."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextBlocks | None = None
    is_error: bool | None = None


ContentBlock = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class Message(BaseModel):
    """One turn."""

    role: Literal["user", "assistant"]
    content: Annotated[
        list[ContentBlock],
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[ContentBlock]),
    ]


class Tool(BaseModel):
    """A function the model may call."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: Literal["custom"] | None = None
    """Only functions: `custom`, or nothing."""
    name: str
    """What the function is called."""
    description: str | None = None
    """What it is for."""
    input_schema: dict[str, Any]
    """The JSON schema of its arguments."""
    strict: bool | None = None
    """Whether a call keeps to all of the schema even under `auto`."""


class ToolChoice(BaseModel):
    """Whether the model must call, and what."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: Literal["auto", "any", "tool", "none"]
    """`auto`, `any` for at least one call, `tool` for the one named, `none`."""
    name: str | None = None
    """Which, for `tool`."""
    disable_parallel_tool_use: bool | None = None
    """Whether there may be only one call."""


class ThinkingConfig(BaseModel):
    """Whether the model thinks before it answers."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: Literal["enabled", "disabled", "adaptive"]
    """`enabled` and `adaptive` let the model think."""
    budget_tokens: int | None = None
    """Most tokens of thought."""


class OutputFormat(BaseModel):
    """A JSON schema that the text must fit."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """What the answer is to look like."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    format: OutputFormat | None = None
    """What the text must be."""
    effort: str | None = None
    """Without effect."""


class CountTokensRequest(BaseModel):
    """Body of POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str
    """A name of the served model, as `/v1/models` lists them."""
    messages: list[Message] = Field(min_length=1)
    """The conversation so far. If the last one is the assistant's, it is continued."""
    system: TextBlocks | None = None
    """Instructions, as text or blocks of text."""
    tools: list[Tool] | None = None
    """Functions the model may call."""
    tool_choice: ToolChoice | None = None
    """Whether it must; `{"type": "auto"}` if not given."""
    thinking: ThinkingConfig | None = None
    """Whether the model thinks first; not unless asked to."""
    output_config: OutputConfig | None = None
    """`format`: a JSON schema that is enforced."""


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: int
    """Most tokens to generate."""
    stop_sequences: list[str] | None = None
    """Strings at the first of which the output ends."""
    stream: bool | None = None
    """Whether the answer is sent as events."""
    temperature: float | None = None
    """0 to 2; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens."""
    metadata: dict[str, Any] | None = None
    """Without effect."""
