"""From a request's fields to `SamplingParams`.

Precedence: the request, then the checkpoint's generation_config, then OpenAI's defaults,
which are those of `SamplingParams`.
"""

from collections.abc import Mapping
from typing import Any

from bezel.engine.errors import PromptTooLong
from bezel.engine.messages import EngineInfo
from bezel.engine.sampling_params import SamplingParams
from bezel.server.schemas import GenerationRequest

_PLAIN_FIELDS = (
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "logit_bias", "seed", "ignore_eos"),
)
_DEFAULTED_FIELDS = {"temperature": float, "top_p": float, "top_k": int}


def sampling_params(
    request: GenerationRequest,
    num_prompt_tokens: int,
    info: EngineInfo,
    generation_config: Mapping[str, Any],
    param: str,
) -> SamplingParams:
    """The checked options of one sequence; `param` is the field that holds the prompt.

    Raises:
        PromptTooLong: prompt and output don't fit the context.
        InvalidRequest: a value is out of range.
    """
    max_tokens = _max_tokens(request.output_limit, num_prompt_tokens, info.max_model_len, param)
    given = {name: getattr(request, name) for name in _PLAIN_FIELDS}
    values = _model_defaults(generation_config)
    values |= {name: value for name, value in given.items() if value is not None}
    # −1 is how vLLM spells "off"; more than all is all, and must fit 64 bits on its way.
    if values.get("top_k") is not None:
        values["top_k"] = 0 if values["top_k"] == -1 else min(values["top_k"], info.vocab_size)
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=tuple(request.stop_token_ids or ()), **values
    )
    params.validate(info.vocab_size)
    return params


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
