"""Anthropic's Messages API: what requests become, and what its own client makes of the answers."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from fastapi import FastAPI
from served import served

from bezel.engine.errors import EngineUnavailable
from bezel.engine.messages import FinishReason
from bezel.server.anthropic.prompt import chat_request
from bezel.server.anthropic.schemas import MessagesRequest

pytestmark = pytest.mark.anyio

MESSAGES: Any = [{"role": "user", "content": "hi"}]
THOUGHT = "<|channel>thought\nHmm.<channel|>"
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
TOOLS: Any = [
    {
        "name": "get_weather",
        "description": "Tells it.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    }
]


@pytest.fixture
def client(engine: Any, gemma4_app: FastAPI) -> Iterator[anthropic.Anthropic]:
    with served(gemma4_app) as url:
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
            yield client


def plain(blocks: Any) -> list[dict[str, Any]]:
    dumped = [block.model_dump(exclude_none=True) for block in blocks]
    return [{k: v for k, v in block.items() if k not in ("id", "signature")} for block in dumped]


EVERYTHING = [
    {"type": "thinking", "thinking": "Hmm."},
    {"type": "text", "text": "Wait."},
    {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris", "days": 2}},
    {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris", "days": 2}},
]


def test_whole_answer(client: anthropic.Anthropic, say: Any) -> None:
    say(f"{THOUGHT}Wait.{CALL}{CALL}<|tool_response>")
    answer = client.messages.create(model="tiny", max_tokens=80, messages=MESSAGES, tools=TOOLS)
    assert plain(answer.content) == EVERYTHING
    assert answer.stop_reason == "tool_use"
    assert answer.stop_sequence is None
    assert answer.role == "assistant"
    assert answer.id.startswith("msg_")
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens > 40


def test_stream_gives_the_same(client: anthropic.Anthropic, say: Any) -> None:
    say(f"{THOUGHT}Wait.{CALL}{CALL}<|tool_response>")
    asked: Any = {"model": "tiny", "max_tokens": 80, "messages": MESSAGES, "tools": TOOLS}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        names = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert plain(streamed.content) == plain(whole.content)
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop") == 4


@pytest.mark.parametrize(
    ("text", "reason", "told", "stop"),
    [
        ("a<turn|>", FinishReason.STOP, "end_turn", None),
        ("ab", FinishReason.LENGTH, "max_tokens", None),
        ("ab##c", FinishReason.LENGTH, "stop_sequence", "##"),
    ],
)
def test_why_it_ended(
    client: anthropic.Anthropic, say: Any, text: str, reason: Any, told: str, stop: str | None
) -> None:
    say(text, reason)
    asked: Any = {"model": "tiny", "max_tokens": 60, "messages": MESSAGES}
    asked["stop_sequences"] = ["##", "1", "2", "3", "4"]
    answer = client.messages.create(**asked)
    assert (answer.stop_reason, answer.stop_sequence) == (told, stop)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == (told, stop)


def test_errors_are_of_its_classes(client: anthropic.Anthropic, say: Any, engine: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="other", max_tokens=9, messages=MESSAGES)
    body: Any = missing.value.body
    assert body["error"]["type"] == "not_found_error"
    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "x", "data": "x"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        asked: Any = [{"role": "user", "content": [image]}]
        client.messages.create(model="tiny", max_tokens=9, messages=asked)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="tiny", max_tokens=0, messages=MESSAGES)
    engine.script = [[ord("a")], EngineUnavailable("gone")]
    with pytest.raises(anthropic.APIStatusError, match="gone"):
        with client.messages.stream(model="tiny", max_tokens=9, messages=MESSAGES) as stream:
            stream.get_final_message()


def test_count_tokens(client: anthropic.Anthropic, say: Any) -> None:
    say("a<turn|>")
    asked: Any = {"model": "tiny", "messages": MESSAGES, "system": "Be brief."}
    answer = client.messages.create(max_tokens=9, **asked)
    assert client.messages.count_tokens(**asked).input_tokens == answer.usage.input_tokens


def converted(**fields: Any) -> dict[str, Any]:
    body = {"model": "m", "max_tokens": 5, "messages": MESSAGES} | fields
    return chat_request(MessagesRequest.model_validate(body)).model_dump(exclude_none=True)


def test_tool_loop_becomes_messages_of_a_chat() -> None:
    user = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": True},
        {"type": "text", "text": "And "},
        {"type": "text", "text": "now?", "cache_control": {"type": "ephemeral"}},
    ]
    assistant = [
        {"type": "thinking", "thinking": "Hmm.", "signature": ""},
        {"type": "text", "text": "Wait."},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"é": 1}},
        {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
    ]
    messages = [*MESSAGES, {"role": "assistant", "content": assistant}]
    messages.append({"role": "user", "content": user})
    system = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"é": 1}'}}
    other = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert converted(messages=messages, system=system)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Hmm.",
            "tool_calls": [{"id": "t1"} | call, {"id": "t2"} | other],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "sun"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no such city"},
        {"role": "user", "content": "And now?"},
    ]


def test_an_answer_that_was_begun_is_continued() -> None:
    prefill = [*MESSAGES, {"role": "assistant", "content": "{"}]
    fields = converted(messages=prefill)
    assert fields["continue_final_message"] is True
    assert fields["add_generation_prompt"] is False
    assert "continue_final_message" not in converted()


@pytest.mark.parametrize(
    ("choice", "told", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "none"}, "none", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, None),
    ],
)
def test_tool_choices(choice: Any, told: Any, parallel: bool | None) -> None:
    fields = converted(tools=TOOLS, tool_choice=choice)
    assert fields["tool_choice"] == told
    assert fields.get("parallel_tool_calls") is parallel
    (tool,) = fields["tools"]
    assert tool["function"]["parameters"] == TOOLS[0]["input_schema"]
    assert tool["function"]["description"] == "Tells it."


def test_thinking_is_off_unless_asked_for() -> None:
    assert converted()["chat_template_kwargs"] == {"enable_thinking": False}
    on = converted(thinking={"type": "enabled", "budget_tokens": 1024})
    assert on["chat_template_kwargs"] == {"enable_thinking": True}
    assert on["thinking_token_budget"] == 1024


def test_schema_of_the_text() -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    fields = converted(output_config={"format": form})
    told = {"name": "output", "schema": {"type": "object"}}
    assert fields["response_format"] == {"type": "json_schema", "json_schema": told}
    assert json.dumps(fields["response_format"])


async def test_unknown_fields_are_told(gemma4_client: Any, say: Any) -> None:
    say("a<turn|>")
    body = {"model": "tiny", "max_tokens": 9, "messages": MESSAGES, "colour": 1, "top_k": 3}
    response = await gemma4_client.post("/v1/messages", json=body)
    assert response.headers["x-ignored-params"] == "colour"
    refused = await gemma4_client.post("/v1/messages", json=body | {"n": 2})
    assert refused.status_code == 400
    assert "n: messages have no such thing" in refused.json()["error"]["message"]


def test_a_choice_among_no_tools_is_refused(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        client.messages.create(
            model="tiny", max_tokens=9, messages=MESSAGES, tool_choice={"type": "any"}
        )
