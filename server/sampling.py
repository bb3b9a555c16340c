"""From a request's fields to `SamplingParams`.

Precedence: the request, then the checkpoint's generation_config, then OpenAI's defaults,
which are those of `SamplingParams`.
"""

from collections.abc import Mapping
from typing import Any

from bezel.engine.errors import InvalidRequest, PromptTooLong
from bezel.engine.messages import EngineInfo
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget
from bezel.server.chat import Thinking
from bezel.server.control_tokens import ControlTokens
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest

MAX_LOGPROBS = 20

_PLAIN_FIELDS = (
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "logit_bias", "seed", "ignore_eos", "priority"),
    "cache_salt",
)
_DEFAULTED_FIELDS = {"temperature": float, "top_p": float, "top_k": int}
# How long a thought may get, in tokens; efforts that aren't here set no limit.
_BUDGET_BY_EFFORT = {"minimal": 512, "low": 1024, "medium": 8192}


def sampling_params(
    request: GenerationRequest,
    num_prompt_tokens: int,
    info: EngineInfo,
    generation_config: Mapping[str, Any],
    param: str,
    *,
    grammar: str | None = None,
    thinking_budget: ThinkingBudget | None = None,
) -> SamplingParams:
    """The checked options of one sequence; `param` is the field that holds the prompt.

    An echo of the prompt may ask for no tokens at all. The engine always makes one, so that
    `max_tokens` is 1 then, and `wants_no_tokens` says that the token is nobody's.

    Raises:
        PromptTooLong: prompt and output don't fit the context.
        InvalidRequest: a value is out of range.
    """
    limit = 1 if wants_no_tokens(request) else request.output_limit
    max_tokens = _max_tokens(limit, num_prompt_tokens, info.max_model_len, param)
    given = {name: getattr(request, name) for name in _PLAIN_FIELDS}
    values = _model_defaults(generation_config)
    values |= {name: value for name, value in given.items() if value is not None}
    # −1 is how vLLM spells "off"; more than all is all, and must fit 64 bits on its way.
    if values.get("top_k") is not None:
        values["top_k"] = 0 if values["top_k"] == -1 else min(values["top_k"], info.vocab_size)
    num_logprobs, num_prompt_logprobs = _logprobs(request)
    params = SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=num_logprobs,
        prompt_logprobs=num_prompt_logprobs,
        grammar=grammar,
        thinking_budget=thinking_budget,
        **values,
    )
    params.validate(info.vocab_size)
    return params


def wants_no_tokens(request: GenerationRequest) -> bool:
    """Whether only the prompt is to be told of."""
    return isinstance(request, CompletionRequest) and bool(request.echo) and request.max_tokens == 0


def seed_of_choice(seed: int | None, number: int) -> int | None:
    """The seed of the choice `number` of a prompt: they follow each other, within 64 bits."""
    return None if seed is None else (seed + number + 2**63) % 2**64 - 2**63


def thinking_budget(
    request: ChatCompletionRequest, control: ControlTokens | None, thinking: Thinking
) -> ThinkingBudget | None:
    """The limit of a thought: `thinking_token_budget`, or what `reasoning_effort` stands for.

    minimal: 512 tokens, low: 1024, medium: 8192, others: no limit, which −1 means too. A model
    without control tokens for thoughts has no use for one.

    Raises:
        InvalidRequest: the budget is out of range.
    """
    num_tokens = request.thinking_token_budget
    if num_tokens is None:
        num_tokens = _BUDGET_BY_EFFORT.get(request.reasoning_effort or "", -1)
    if not -1 <= num_tokens < 2**31:
        raise InvalidRequest(
            f"thinking_token_budget must be -1 for no limit, or from 0 to {2**31 - 1}, "
            f"got {num_tokens}.",
            "thinking_token_budget",
        )
    if control is None or num_tokens == -1:
        return None
    return ThinkingBudget(
        num_tokens=num_tokens,
        open_id=control.channel_open,
        close_id=control.channel_close,
        is_open=thinking is Thinking.OPEN,
    )


def _logprobs(request: GenerationRequest) -> tuple[int | None, int | None]:
    """How many log-probabilities the engine must tell, of the output and of the prompt.

    The echo of a prompt shows as many as the output does.
    """
    num_logprobs, num_prompt_logprobs = request.num_logprobs, request.prompt_logprobs
    name = "top_logprobs" if isinstance(request, ChatCompletionRequest) else "logprobs"
    for param, number in ((name, num_logprobs), ("prompt_logprobs", num_prompt_logprobs)):
        if number is not None and not 0 <= number <= MAX_LOGPROBS:
            raise InvalidRequest(
                f"{param} must be at least 0 and at most {MAX_LOGPROBS}, got {number}.", param
            )
    if num_logprobs is not None and isinstance(request, CompletionRequest) and request.echo:
        num_prompt_logprobs = max(num_logprobs, num_prompt_logprobs or 0)
    return num_logprobs, num_prompt_logprobs


def _max_tokens(limit: int | None, num_prompt_tokens: int, max_model_len: int, param: str) -> int:
    room = max_model_len - num_prompt_tokens
    if room < 1 or (limit is not None and limit > room):
        error = PromptTooLong(num_prompt_tokens, limit or 0, max_model_len)
        error.param = param
        raise error
    return room if limit is None else limit


def _model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    if generation_config.get("do_sample") is False:
        return {}
    return {
        name: kind(generation_config[name])
        for name, kind in _DEFAULTED_FIELDS.items()
        if generation_config.get(name) is not None
    }
