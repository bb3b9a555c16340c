"""What can be wrong with a request whatever its prompt says: fields, numbers of choices, length."""

import math

from bezel.engine.errors import InvalidRequest
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from bezel.server.state import ServedModel, ServerState
from bezel.server.unsupported import check_extra_fields, ignored_header

_MAX_N = 128


def check_request(state: ServerState, body: GenerationRequest) -> dict[str, str]:
    """What can be said before the prompt is looked at; returns headers of the response.

    Raises:
        InvalidRequest: fields are unknown, contradict each other or ask for too much.
    """
    fields = dict(body.model_extra or {})
    if body.stream_options is not None:
        extra = body.stream_options.model_extra or {}
        fields |= {f"stream_options.{name}": value for name, value in extra.items()}
    ignored = check_extra_fields(fields, state.config.unknown_params, state.reported_fields)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options goes only with stream.", "stream_options")
    if body.timeout is not None and not 0 < body.timeout < math.inf:
        raise InvalidRequest(f"timeout must be greater than 0, got {body.timeout}.", "timeout")
    _check_number_of_choices(state, body)
    if isinstance(body, ChatCompletionRequest) and body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs goes only with logprobs.", "top_logprobs")
    return ignored_header(ignored)


def _check_number_of_choices(state: ServerState, body: GenerationRequest) -> None:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= _MAX_N:
        raise InvalidRequest(f"n must be at least 1 and at most {_MAX_N}, got {n}.", "n")
    num_prompts = 1
    if isinstance(body, CompletionRequest):
        num_prompts = len(body.prompt)
        if body.best_of not in (None, n):
            raise InvalidRequest("best_of must be the same as n.", "best_of")
    # More could never be admitted together, however long the client waits.
    limit = state.admission.places.capacity
    if n * num_prompts > limit:
        raise InvalidRequest(
            f"A request may ask for at most {limit} choices in all, not {n * num_prompts}.",
            "n" if n > 1 else "prompt",
        )


def truncated_prompt(
    body: GenerationRequest, prompt_ids: list[int], model: ServedModel
) -> list[int]:
    """The last `truncate_prompt_tokens` tokens of a prompt, of which <bos> is always the first.

    −1 stands for as many as leave room for the output.

    Raises:
        InvalidRequest: the number can't be.
    """
    limit = body.truncate_prompt_tokens
    max_model_len = model.engine.info.max_model_len
    if limit is None:
        return prompt_ids
    if limit == -1:
        limit = max(1, max_model_len - max(1, body.output_limit or 1))
    if not 1 <= limit <= max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1, or at least 1 and at most {max_model_len}, "
            f"got {limit}.",
            "truncate_prompt_tokens",
        )
    if len(prompt_ids) <= limit:
        return prompt_ids
    bos = prompt_ids[:1] if prompt_ids[0] == model.tokenizer.bos_token_id else []
    return bos + prompt_ids[len(prompt_ids) - limit + len(bos) :]
