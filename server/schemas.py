"""The wire types of requests: which fields there are, and their JSON types.

Ranges are checked where values are used (`SamplingParams.validate`); null always means
"not given". What lies deeper in tools, schemas and formats is checked where it is read. Fields
that aren't declared here end up in `model_extra`, and `server.unsupported` decides what to say
of them. The strings under fields are their descriptions in the OpenAPI document and in
docs/http-api.md.
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


def _as_number_of_logprobs(value: Any) -> Any:
    """Chat's `false` is understood here too; 0 asks for the drawn tokens' own."""
    return None if value is False else value


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
NumLogprobs = Annotated[
    int | None, BeforeValidator(_as_number_of_logprobs, json_schema_input_type=int | None)
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(BaseModel):
    """How a stream is to be sent."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    include_usage: bool | None = None
    """Whether a last chunk without choices tells the usage."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: whether each chunk tells the usage up to it."""


class GenerationRequest(BaseModel):
    """What both generating routes understand."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str
    """A name of the served model, as `/v1/models` lists them."""
    # How much, and where it ends.
    max_tokens: int | None = None
    """Most tokens to generate; as many as the context has room for if not given."""
    min_tokens: int | None = None
    """Tokens before which nothing but a stop string ends the output."""
    n: int | None = None
    """Choices for each prompt, 1 to 128; with a seed, the choice *i* has the seed plus *i*."""
    stop: StopStrings = ()
    """Strings, four at most, at the first of which the output ends; it is not part of it."""
    stop_token_ids: list[int] | None = None
    """Token ids that end the output, besides the model's own."""
    include_stop_str_in_output: bool | None = None
    """Whether the stop string or token is part of the output after all."""
    ignore_eos: bool | None = None
    """Whether to go on past the tokens that end an answer."""
    truncate_prompt_tokens: int | None = None
    """Keep only so many tokens from the end of the prompt; −1: as many as fit."""
    # How tokens are drawn.
    temperature: float | None = None
    """0 to 2; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability; above 0, up to 1."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens; 0 or −1: from all."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the likeliest's probability; 0 to 1."""
    presence_penalty: float | None = None
    """Taken off the logits of tokens that the output has already; −2 to 2."""
    frequency_penalty: float | None = None
    """The same, times how often it has them; −2 to 2."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens of prompt and output; 0.001 to 1000, 1 is none."""
    logit_bias: dict[int, float] | None = None
    """Token ids with what to add to their logits; −100 to 100."""
    seed: int | None = None
    """Makes the draws repeatable; 64 bits, signed."""
    # What the output must be.
    response_format: dict[str, Any] | None = None
    """`text`, `json_object`, or `json_schema` with a schema that is always enforced."""
    structured_outputs: dict[str, Any] | None = None
    """One of `json`, `regex`, `choice`, `grammar` and `json_object`, as vLLM has it."""
    guided_json: Any = None
    """A JSON schema, or its text."""
    guided_regex: str | None = None
    """A regular expression for the whole output."""
    guided_choice: list[str] | None = None
    """The strings of which the output is one."""
    guided_grammar: str | None = None
    """A grammar in llguidance's Lark or llama.cpp's GBNF."""
    json_schema: Any = None
    """Same as `guided_json`, as llama.cpp has it."""
    regex: str | None = None
    """Same as `guided_regex`."""
    grammar: str | None = None
    """Same as `guided_grammar`, as llama.cpp has it."""
    # What is told of it.
    prompt_logprobs: int | None = None
    """Tell the prompt's log-probabilities, and of so many likeliest tokens; 0 to 20."""
    skip_special_tokens: bool | None = None
    """Whether control tokens are left out of the text; true if not given."""
    stream: bool | None = None
    """Whether the answer is sent piece by piece, as server-sent events."""
    stream_options: StreamOptions | None = None
    """How it is; goes only with `stream`."""
    return_token_ids: bool | None = None
    """Whether to add `prompt_token_ids` and the `token_ids` of each choice."""
    # When it is computed, for how long (in seconds), and what it may share.
    priority: int | None = None
    """Requests of a lower number go first; 0 if not given."""
    timeout: float | None = None
    """Seconds the answer may take; a longer time than `--request-timeout` has no effect."""
    cache_salt: str | None = None
    """Only requests with the same one share what the prefix cache holds."""

    @property
    def output_limit(self) -> int | None:
        """The most tokens to generate, whatever the field's name."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each; None asks for no logprobs."""
        raise NotImplementedError


class ChatMessage(BaseModel):
    """One turn; `content` is text or a list of parts, which `server.chat` looks into."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Whose turn it is; `developer` is another name of `system`."""
    content: Any = None
    """Text, or a list of parts of the types `text` and `refusal`."""
    name: str | None = None
    """The name of who speaks, for templates that show it."""
    refusal: str | None = None
    """An assistant's text where `content` is null."""
    reasoning: str | None = None
    """Same as `reasoning_content`."""
    reasoning_content: str | None = None
    """What the model thought in this turn."""
    tool_calls: list[dict[str, Any]] | None = None
    """An assistant's calls, each to be answered by a message of role `tool`."""
    tool_call_id: str | None = None
    """In a tool's message: the call that is answered."""


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation so far; one message at least."""
    max_completion_tokens: int | None = None
    """Newer name of `max_tokens`, and goes before it."""
    logprobs: bool | None = None
    """Whether to tell the tokens' log-probabilities."""
    top_logprobs: int | None = None
    """Tell those of so many likeliest tokens too; 0 to 20, goes only with `logprobs`."""
    # How the messages become a prompt.
    add_generation_prompt: bool | None = None
    """Whether to begin a turn of the model; true if not given."""
    continue_final_message: bool | None = None
    """Whether to go on with the last message, the model's, rather than answer."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the template, such as `enable_thinking`."""
    documents: list[Any] | None = None
    """Documents, for templates that show them."""
    # Tools.
    tools: list[dict[str, Any]] | None = None
    """Functions the model may call."""
    tool_choice: str | dict[str, Any] | None = None
    """`auto`, `none`, `required`, or a function to call."""
    parallel_tool_calls: bool | None = None
    """False: one call at most. True if not given."""
    # Thinking.
    reasoning_effort: Effort | None = None
    """Whether to think, and how long; see [thinking](#thinking)."""
    thinking_token_budget: int | None = None
    """Most tokens of thought; −1: no limit. Goes before the effort's."""
    include_reasoning: bool | None = None
    """False: thoughts are left out of the answer."""

    @property
    def output_limit(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
    """Text or token ids, or a list of either: each gets its own choices."""
    best_of: int | None = None
    """Only the same as `n`."""
    echo: bool | None = None
    """Whether the text begins with the prompt. With `max_tokens` 0 it is all there is."""
    logprobs: NumLogprobs = None
    """Tell the tokens' log-probabilities, and of so many likeliest tokens; 0 to 20."""

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
