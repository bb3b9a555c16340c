"""The two generating routes: check, tokenize, then stream or collect.

They differ in where the prompt stands, in what the output must be, and in the shape of the
answer. Nothing is handed to the engine before all of that is known to be in order.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bezel.engine.errors import InvalidRequest
from bezel.engine.sampling_params import SamplingParams
from bezel.server.answers import Answer
from bezel.server.auth import tenant
from bezel.server.chat import Thinking
from bezel.server.chat_answer import ChatAnswer
from bezel.server.checks import check_request, truncated_prompt
from bezel.server.completion_answer import CompletionAnswer
from bezel.server.control_tokens import ControlTokens
from bezel.server.disconnect import unless_disconnected
from bezel.server.errors import json_response
from bezel.server.generation import TextRequest, collect
from bezel.server.grammars.structured_output import constrained_field, output_grammar
from bezel.server.parsing.parser import ChatParser, OutputParser, TextParser
from bezel.server.prompts import chat_prompt, completion_prompts
from bezel.server.sampling import (
    sampling_params,
    seed_of_choice,
    thinking_budget,
    wants_no_tokens,
)
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from bezel.server.state import ServedModel, state_of
from bezel.server.streaming import EventStream

# Up to here their JSON takes some milliseconds; that of a long echo must not hold up streams.
_MAX_LOGPROBS_ON_LOOP = 256


async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    model = state.require_model(body.model)
    headers = check_request(state, body)
    answer_id = f"{ChatAnswer.id_prefix}-{uuid.uuid4().hex}"
    requests = await chat_requests(model, body, answer_id)
    answer = ChatAnswer(answer_id, body, model.tokenizer, [requests[0].prompt_ids])
    return await _respond(request, body, requests, answer, headers)


async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several texts."""
    state = state_of(request)
    model = state.require_model(body.model)
    headers = check_request(state, body)
    answer_id = f"{CompletionAnswer.id_prefix}-{uuid.uuid4().hex}"
    requests = await completion_requests(model, body, answer_id)
    prompts = [request.prompt_ids for request in requests[:: body.n or 1]]
    answer = CompletionAnswer(answer_id, body, model.tokenizer, prompts)
    return await _respond(request, body, requests, answer, headers)


async def chat_requests(
    model: ServedModel, body: ChatCompletionRequest, answer_id: str
) -> list[TextRequest]:
    """The sequences that answer a conversation: `n` of them, all with the same prompt.

    Raises:
        InvalidRequest: the prompt, or what is asked of its answer, isn't right.
    """
    info = model.engine.info
    prompt = await chat_prompt(
        model.tokenizer, model.control, body, info.vocab_size, model.template_kwargs
    )
    prompt_ids = truncated_prompt(body, prompt.token_ids, model)
    params = sampling_params(
        body,
        len(prompt_ids),
        info,
        model.checkpoint.generation_config,
        "messages",
        grammar=await _checked_grammar(body, model, model.control, prompt.thinking),
        thinking_budget=thinking_budget(body, model.control, prompt.thinking),
    )
    if prompt_ids == prompt.token_ids:
        params = msgspec.structs.replace(params, num_preamble_tokens=prompt.num_preamble_tokens)
    new_parser = partial(_chat_parser, body, model, prompt_ids)
    return _text_requests(answer_id, body, [(prompt_ids, params)], new_parser)


async def completion_requests(
    model: ServedModel, body: CompletionRequest, answer_id: str
) -> list[TextRequest]:
    """The sequences that continue texts: `n` of them for each.

    Raises:
        InvalidRequest: a prompt, or what is asked of its continuation, isn't right.
    """
    info, config = model.engine.info, model.checkpoint.generation_config
    prompts = await completion_prompts(model.tokenizer, body, info.vocab_size)
    prompts = [truncated_prompt(body, prompt_ids, model) for prompt_ids in prompts]
    grammar = await _checked_grammar(body, model, None, Thinking.OFF)
    params = [
        sampling_params(body, len(prompt_ids), info, config, "prompt", grammar=grammar)
        for prompt_ids in prompts
    ]
    new_parser = partial(_text_parser, body, model)
    return _text_requests(answer_id, body, list(zip(prompts, params, strict=True)), new_parser)


async def _checked_grammar(
    body: ChatCompletionRequest | CompletionRequest,
    model: ServedModel,
    control: ControlTokens | None,
    thinking: Thinking,
) -> str | None:
    grammar = output_grammar(body, control, thinking)
    if grammar is not None:
        try:
            await model.grammars.check(grammar)
        except InvalidRequest as error:
            # The checker can't know where the grammar came from.
            error.param = error.param or constrained_field(body)
            raise
    return grammar


def _text_parser(body: GenerationRequest, model: ServedModel) -> OutputParser:
    return TextParser(
        model.tokenizer,
        stop=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _chat_parser(
    body: ChatCompletionRequest, model: ServedModel, prompt_ids: list[int]
) -> OutputParser:
    if model.control is None:
        return _text_parser(body, model)
    return ChatParser(
        model.tokenizer,
        model.control,
        prompt_ids,
        stop=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        parse_tools=bool(body.tools) and body.tool_choice != "none",
        new_call_id=lambda: f"call_{uuid.uuid4().hex}",
    )


def _text_requests(
    answer_id: str,
    body: GenerationRequest,
    prompts: Sequence[tuple[list[int], SamplingParams]],
    new_parser: Callable[[], OutputParser],
) -> list[TextRequest]:
    """`n` sequences for every prompt."""
    choices = [(*prompt, number) for prompt in prompts for number in range(body.n or 1)]
    return [
        TextRequest(
            request_id=f"{answer_id}-{index}",
            prompt_ids=prompt_ids,
            params=msgspec.structs.replace(
                params, seed=seed_of_choice(params.seed, number), tenant=tenant.get()
            ),
            parser=new_parser(),
            include_stop=bool(body.include_stop_str_in_output),
            hides_tokens=wants_no_tokens(body),
            timeout_s=body.timeout,
        )
        for index, (prompt_ids, params, number) in enumerate(choices)
    ]


async def _respond(
    request: Request,
    body: GenerationRequest,
    requests: Sequence[TextRequest],
    answer: Answer,
    headers: Mapping[str, str],
) -> Response:
    state = state_of(request)
    if body.stream:
        return EventStream(state, requests, answer, headers)
    choices = await unless_disconnected(request.receive, collect(state, requests))
    num_logprobs = sum(len(choice.logprobs) + len(choice.prompt_logprobs) for choice in choices)
    if num_logprobs <= _MAX_LOGPROBS_ON_LOOP:
        return json_response(answer.whole(choices), headers=headers)
    return json_response(await asyncio.to_thread(answer.whole, choices), headers=headers)
