"""The wire types of OpenAI's Responses API: which fields a request has, and their JSON types."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Part(BaseModel):
    """A piece of a message or of a call's output; only those of text are understood."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: str
    text: str | None = None
    refusal: str | None = None


class MessageItem(BaseModel):
    """A turn, of whichever side; the type may be left out."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class CallItem(BaseModel):
    """A call in an earlier answer."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(BaseModel):
    """What a call gave."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]


class ReasoningItem(BaseModel):
    """What the model thought in an earlier answer."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: Literal["reasoning"]
    content: list[Part] | None = None
    summary: list[Part] | None = None


class OtherItem(BaseModel):
    """One of a kind that isn't understood; refused by name."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: str


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "other")
    known = ("message", "function_call", "function_call_output", "reasoning")
    return kind if kind in known else "other"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_kind),
]


class TextConfig(BaseModel):
    """What the text must be, in `format`."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    format: dict[str, Any] | None = None
    """`text`, `json_object`, or `json_schema` with `name` and `schema`."""
    verbosity: str | None = None
    """Without effect."""


class ReasoningConfig(BaseModel):
    """How long the model may think."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    effort: str | None = None
    """Whether to think, and how long; see [thinking](#thinking)."""
    summary: str | None = None
    """Without effect: the whole thought is told."""


class ResponsesRequest(BaseModel):
    """Body of POST /v1/responses."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str
    """A name of the served model, as `/v1/models` lists them."""
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    """Text, or items: messages, calls, their outputs, and thoughts of earlier answers."""
    instructions: str | None = None
    """What the system says first."""
    max_output_tokens: int | None = None
    """Most tokens to generate; as many as the context has room for if not given."""
    temperature: float | None = None
    """0 to 2; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    tools: list[dict[str, Any]] | None = None
    """Functions the model may call."""
    tool_choice: str | dict[str, Any] | None = None
    """`auto`, `none`, `required`, or a function to call."""
    parallel_tool_calls: bool | None = None
    """False: one call at most."""
    text: TextConfig | None = None
    """What the text must be, in `format`."""
    reasoning: ReasoningConfig | None = None
    """How long the model may think, in `effort`."""
    include: list[str] | None = None
    """`reasoning.encrypted_content` is accepted without effect."""
    stream: bool | None = None
    """Whether the answer is sent as events."""
    stream_options: dict[str, Any] | None = None
    """Accepted without effect."""
    truncation: str | None = None
    """`auto` drops the beginning of a prompt that is too long; `disabled` refuses it."""
    metadata: dict[str, Any] | None = None
    """Told back in the answer."""
    store: bool | None = None
    """Without effect: nothing is stored."""
    user: str | None = None
    """Told back in the answer."""
