"""The two generating routes: check, tokenize, then stream or collect.

They differ in where the prompt stands and in the shape of the answer, in nothing else.
"""

import time
import uuid
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from bezel.engine.errors import InvalidRequest
from bezel.server.disconnect import unless_disconnected
from bezel.server.errors import json_response
from bezel.server.generation import TextRequest, generating
from bezel.server.prompts import chat_prompt, completion_prompts
from bezel.server.responses import Answer, ChatAnswer, Choice, CompletionAnswer
from bezel.server.sampling import sampling_params
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from bezel.server.state import ServedModel, ServerState, state_of
from bezel.server.streaming import EventStream
from bezel.server.unsupported import check_extra_fields


async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation."""
    model = _check(state_of(request), body)
    prompts = [await chat_prompt(model.tokenizer, body, model.engine.info.vocab_size)]
    return await _respond(request, body, model, prompts, ChatAnswer, "messages")


async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several texts."""
    model = _check(state_of(request), body)
    prompts = await completion_prompts(model.tokenizer, body, model.engine.info.vocab_size)
    return await _respond(request, body, model, prompts, CompletionAnswer, "prompt")


def _check(state: ServerState, body: GenerationRequest) -> ServedModel:
    """What can be said before the prompt is looked at."""
    model = state.require_model(body.model)
    check_extra_fields(body.model_extra or {}, state.reported_fields)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options goes only with stream.", "stream_options")
    return model


async def _respond(
    request: Request,
    body: GenerationRequest,
    model: ServedModel,
    prompts: Sequence[list[int]],
    answer_class: type[Answer],
    param: str,
) -> Response:
    state = state_of(request)
    answer = answer_class(
        id=f"{answer_class.id_prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=body.model,
        prompts=prompts,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        return_token_ids=bool(body.return_token_ids),
    )
    text_requests = [
        _text_request(f"{answer.id}-{index}", body, model, prompt_ids, param)
        for index, prompt_ids in enumerate(prompts)
    ]
    if body.stream:
        return EventStream(state, text_requests, answer)
    choices = await unless_disconnected(request.receive, _collect(state, text_requests))
    return json_response(answer.whole(choices))


def _text_request(
    request_id: str, body: GenerationRequest, model: ServedModel, prompt_ids: list[int], param: str
) -> TextRequest:
    params = sampling_params(
        body, len(prompt_ids), model.engine.info, model.checkpoint.generation_config, param
    )
    return TextRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        params=params,
        stop=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


async def _collect(state: ServerState, text_requests: Sequence[TextRequest]) -> list[Choice]:
    choices = [Choice() for _ in text_requests]
    async with generating(state, text_requests) as generation:
        async for delta in generation.deltas():
            if delta is not None:
                choices[delta.index].add(delta)
    return choices
