"""OpenAI's Responses API: what requests become, and what its own client makes of the answers."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from served import served

from bezel.engine.errors import EngineUnavailable, InvalidRequest
from bezel.engine.messages import FinishReason
from bezel.server.responses.prompt import chat_request
from bezel.server.responses.schemas import ResponsesRequest

THOUGHT = "<|channel>thought\nHmm.<channel|>"
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
TOOLS: Any = [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}]


@pytest.fixture
def client(engine: Any, gemma4_app: FastAPI) -> Iterator[openai.OpenAI]:
    with served(gemma4_app) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client


def plain(items: Any) -> list[dict[str, Any]]:
    """Without what is different in every answer."""
    dumped = [item.model_dump(exclude_none=True) for item in items]
    unlike = ("id", "call_id", "parsed_arguments")
    for item in dumped:
        for part in item.get("content", ()):
            part.pop("parsed", None)
    return [{k: v for k, v in item.items() if k not in unlike} for item in dumped]


def test_whole_answer(client: openai.OpenAI, say: Any) -> None:
    say(f"{THOUGHT}Wait.{CALL}{CALL}<|tool_response>")
    answer = client.responses.create(model="tiny", input="hi", tools=TOOLS)
    reasoning, message, *calls = answer.output
    assert plain([reasoning, message]) == [
        {
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hmm."}],
        },
        {
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "Wait.", "annotations": [], "logprobs": []}
            ],
        },
    ]
    assert len(calls) == 2
    for call in calls:
        assert call.type == "function_call"
        assert (call.name, call.status) == ("get_weather", "completed")
        assert json.loads(call.arguments) == {"city": "Paris", "days": 2}
        assert call.call_id.startswith("call_")
    assert len({item.id for item in answer.output}) == 4
    assert answer.output_text == "Wait."
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_stream_gives_the_same(client: openai.OpenAI, say: Any) -> None:
    say(f"{THOUGHT}Wait.{CALL}{CALL}<|tool_response>")
    asked: Any = {"model": "tiny", "input": "hi", "tools": TOOLS}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert plain(streamed.output) == plain(whole.output)
    assert streamed.usage == whole.usage
    raw = list(client.responses.create(stream=True, **asked))
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    names = [event.type for event in raw]
    assert names[:3] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
    ]
    assert names[-1] == "response.completed"
    assert names.count("response.output_item.added") == 4
    assert names.count("response.output_item.done") == 4
    assert names.count("response.content_part.done") == 2
    text = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(text) == "Wait."
    thought = [e.delta for e in raw if e.type == "response.reasoning_text.delta"]
    assert "".join(thought) == "Hmm."


def test_an_answer_cut_off(client: openai.OpenAI, say: Any) -> None:
    say("abc", FinishReason.LENGTH)
    asked: Any = {"model": "tiny", "input": "hi", "max_output_tokens": 3}
    answer = client.responses.create(**asked)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    (message,) = answer.output
    assert message.type == "message" and message.status == "incomplete"
    events = list(client.responses.create(stream=True, **asked))
    assert events[-1].type == "response.incomplete"
    assert events[-2].type == "response.output_item.done"
    assert events[-2].item.status == "incomplete"


def test_error_in_a_stream(client: openai.OpenAI, engine: Any) -> None:
    engine.script = [[ord("a")], EngineUnavailable("gone")]
    with client.responses.create(model="tiny", input="hi", stream=True) as stream:
        *_, last = stream
    assert last.type == "error"
    assert last.message == "gone"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("previous_response_id", "resp_1", "previous_response_id"),
        ("background", True, "background"),
        ("include", ["file_search_call.results"], "include"),
        ("tools", [{"type": "web_search"}], "tools[0].type"),
        ("input", [{"type": "item_reference", "id": "x"}], "input[0]"),
        ("truncation", "maybe", "truncation"),
        ("max_output_tokens", 0, "max_tokens"),
    ],
)
def test_refusals_name_the_field(client: openai.OpenAI, field: str, value: Any, param: str) -> None:
    asked: Any = {"model": "tiny", "input": "hi"} | {field: value}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**asked)
    assert refused.value.param == param


def converted(**fields: Any) -> dict[str, Any]:
    body = {"model": "m", "input": "hi"} | fields
    return chat_request(ResponsesRequest.model_validate(body)).model_dump(exclude_none=True)


def test_items_become_messages_of_a_chat() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "role": "assistant", "content": "Wait.", "id": "msg_1"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "rain"}],
        },
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
        {"type": "function_call", "call_id": "c3", "name": "g", "arguments": "{}"},
        {"role": "developer", "content": "Hurry."},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    other = {"type": "function", "function": {"name": "g", "arguments": "{}"}}
    assert converted(input=items, instructions="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Hm",
            "tool_calls": [{"id": "c1"} | call, {"id": "c2"} | other],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "So.",
            "tool_calls": [{"id": "c3"} | other],
        },
        {"role": "developer", "content": "Hurry."},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
    ]


def test_fields_have_other_names() -> None:
    form = {"type": "json_schema", "name": "out", "schema": {"type": "object"}, "strict": True}
    fields = converted(
        max_output_tokens=7,
        reasoning={"effort": "low"},
        text={"format": form},
        tools=TOOLS,
        tool_choice={"type": "function", "name": "get_weather"},
        truncation="auto",
        seed=3,
    )
    assert fields["max_tokens"] == 7
    assert fields["reasoning_effort"] == "low"
    assert fields["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "out", "schema": {"type": "object"}, "strict": True},
    }
    function = {"name": "get_weather", "parameters": PARAMETERS}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
    assert fields["truncate_prompt_tokens"] == -1
    assert fields["seed"] == 3


def test_bad_fields_are_the_users_mistake() -> None:
    with pytest.raises(InvalidRequest) as refused:
        converted(reasoning={"effort": "huge"})
    assert refused.value.param == "reasoning_effort"


@pytest.mark.parametrize(
    ("field", "value"), [("n", 2), ("max_completion_tokens", 5), ("include", 5), ("include", [{}])]
)
def test_fields_that_have_no_place_here(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="hi", extra_body={field: value})
    assert refused.value.param == field


def test_a_choice_among_no_tools_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="hi", tool_choice="required")
    assert refused.value.param == "tool_choice"
