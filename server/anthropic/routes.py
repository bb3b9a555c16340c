"""Anthropic's two routes: answer a conversation, and count its tokens."""

import uuid

from starlette.requests import Request
from starlette.responses import Response

from bezel.server.anthropic.answer import MessageAnswer
from bezel.server.anthropic.prompt import chat_request
from bezel.server.anthropic.schemas import CountTokensRequest, MessagesRequest
from bezel.server.checks import check_request
from bezel.server.completions import chat_requests
from bezel.server.disconnect import unless_disconnected
from bezel.server.errors import json_response
from bezel.server.generation import for_each_delta
from bezel.server.prompts import chat_prompt
from bezel.server.state import state_of
from bezel.server.streaming import EventStream


async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, in the terms of Anthropic's Messages API."""
    state = state_of(request)
    model = state.require_model(body.model)
    chat = chat_request(body)
    headers = check_request(state, chat)
    answer_id = f"msg_{uuid.uuid4().hex}"
    requests = await chat_requests(model, chat, answer_id)
    answer = MessageAnswer(answer_id, body.model, requests[0])
    if body.stream:
        return EventStream(state, requests, answer, headers)
    await unless_disconnected(request.receive, for_each_delta(state, requests, answer.add))
    return json_response(answer.whole(), headers=headers)


async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
    """How many tokens the prompt of such a request has."""
    state = state_of(request)
    model = state.require_model(body.model)
    chat = chat_request(body)
    headers = check_request(state, chat)
    prompt = await chat_prompt(
        model.tokenizer,
        model.control,
        chat,
        model.engine.info.vocab_size,
        model.template_kwargs,
    )
    return json_response({"input_tokens": len(prompt.token_ids)}, headers=headers)
