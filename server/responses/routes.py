"""POST /v1/responses. Nothing is stored: each request brings the whole conversation."""

import uuid

from starlette.requests import Request
from starlette.responses import Response

from bezel.server.checks import check_request
from bezel.server.completions import chat_requests
from bezel.server.disconnect import unless_disconnected
from bezel.server.errors import json_response
from bezel.server.generation import for_each_delta
from bezel.server.responses.answer import ResponseAnswer
from bezel.server.responses.prompt import chat_request
from bezel.server.responses.schemas import ResponsesRequest
from bezel.server.state import state_of
from bezel.server.streaming import EventStream


async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation, in the terms of OpenAI's Responses API."""
    state = state_of(request)
    model = state.require_model(body.model)
    chat = chat_request(body)
    headers = check_request(state, chat)
    answer_id = f"resp_{uuid.uuid4().hex}"
    requests = await chat_requests(model, chat, answer_id)
    answer = ResponseAnswer(answer_id, body, requests[0])
    if body.stream:
        return EventStream(state, requests, answer, headers)
    await unless_disconnected(request.receive, for_each_delta(state, requests, answer.add))
    return json_response(answer.whole(), headers=headers)
