"""The generating routes, not streamed: answers, every refusal, disconnects."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.errors import EngineUnavailable
from bezel.engine.messages import FailureCause, FinishReason
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest
from bezel.server.version import SYSTEM_FINGERPRINT

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


async def test_chat_answer(client: httpx.AsyncClient, engine: Any, chat: Any) -> None:
    engine.say("Hello!")
    response = await client.post(CHAT, json=chat())
    assert response.status_code == 200
    answer = response.json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 0
    prompt = "user:hi\nassistant:"
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": SYSTEM_FINGERPRINT,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 1 + len(prompt),
            "completion_tokens": 7,
            "total_tokens": 1 + len(prompt) + 7,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert engine.requests[0][0] == [256, *prompt.encode()]


async def test_completion_answer(client: httpx.AsyncClient, engine: Any, completion: Any) -> None:
    engine.say("Hello", FinishReason.LENGTH)
    answer = (await client.post(COMPLETIONS, json=completion(max_tokens=5))).json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 0
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": SYSTEM_FINGERPRINT,
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[256, 97, 98]]),
        (["ab", "c"], [[256, 97, 98], [256, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
    ids=["string", "strings", "token ids", "several token ids"],
)
async def test_prompt_forms(
    client: httpx.AsyncClient, engine: Any, completion: Any, prompt: Any, expected: list[list[int]]
) -> None:
    engine.say("x")
    answer = (await client.post(COMPLETIONS, json=completion(prompt=prompt))).json()
    assert [ids for ids, _ in engine.requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 2 * len(expected)
    assert len(set(engine.request_ids)) == len(expected)


async def test_choices_stay_with_their_prompts(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    late = asyncio.Event()
    engine.scripts_by_prompt = {
        (1,): [late, [65], FinishReason.LENGTH],
        (2,): [[66], FinishReason.STOP],
    }
    post = asyncio.create_task(client.post(COMPLETIONS, json=completion(prompt=[[1], [2]])))
    await engine.begun.wait()
    late.set()
    choices = (await post).json()["choices"]
    assert [(c["text"], c["finish_reason"]) for c in choices] == [("A", "length"), ("B", "stop")]


async def test_token_ids_on_request(
    client: httpx.AsyncClient, engine: Any, chat: Any, completion: Any
) -> None:
    engine.say("Hi")
    answer = (await client.post(CHAT, json=chat(return_token_ids=True))).json()
    assert answer["prompt_token_ids"] == [256, *b"user:hi\nassistant:"]
    assert answer["choices"][0]["token_ids"] == [*b"Hi", 257]
    body = completion(prompt=["a", "b"], return_token_ids=True)
    answer = (await client.post(COMPLETIONS, json=body)).json()
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[256, 97], [256, 98]]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[*b"Hi", 257]] * 2


async def test_parameters_reach_the_engine(
    client: httpx.AsyncClient, engine: Any, chat: Any
) -> None:
    engine.say("x")
    fields = {
        "max_tokens": 3,
        "max_completion_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"65": -100, "66": 1.5},
        "seed": 42,
        "stop_token_ids": [13],
        "ignore_eos": True,
        "priority": -3,
        "logprobs": True,
        "top_logprobs": 4,
        "prompt_logprobs": 2,
    }
    assert (await client.post(CHAT, json=chat(**fields))).status_code == 200
    params = engine.requests[0][1]
    assert params.max_tokens == 7
    assert params.logit_bias == {65: -100.0, 66: 1.5}
    assert params.stop_token_ids == (13,)
    assert (params.logprobs, params.prompt_logprobs, params.priority) == (4, 2, -3)
    for name in ("min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"):
        assert getattr(params, name) == fields[name]
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert getattr(params, name) == fields[name]


async def test_template_kwargs_reach_the_template(
    client: httpx.AsyncClient, engine: Any, tokenizer: Any, chat: Any
) -> None:
    engine.say("x")
    kwargs = {"enable_thinking": True}
    await client.post(CHAT, json=chat(chat_template_kwargs=kwargs))
    assert tokenizer.template_kwargs == kwargs


async def test_null_means_not_given(
    client: httpx.AsyncClient, engine: Any, chat: Any, completion: Any
) -> None:
    engine.say("x")
    names = {*ChatCompletionRequest.model_fields, "user", "suffix", "functions", "nobody_knows"}
    response = await client.post(CHAT, json=dict.fromkeys(names) | chat())
    assert response.status_code == 200
    names = {*CompletionRequest.model_fields, "user", "suffix", "nobody_knows"}
    response = await client.post(COMPLETIONS, json=dict.fromkeys(names) | completion())
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"messages": None}, "messages", None),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            None,
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": "x" * 90}]}, "messages", "too_long"),
        ({"max_tokens": 90}, "messages", "too_long"),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_completion_tokens": -1}, "max_tokens", None),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", None),
        ({"temperature": 2.1}, "temperature", None),
        ({"temperature": "hot"}, "temperature", None),
        ({"top_p": 0}, "top_p", None),
        ({"top_k": -2}, "top_k", None),
        ({"min_p": 1.5}, "min_p", None),
        ({"presence_penalty": 3}, "presence_penalty", None),
        ({"frequency_penalty": -3}, "frequency_penalty", None),
        ({"repetition_penalty": 0}, "repetition_penalty", None),
        ({"seed": 2**64}, "seed", None),
        ({"logit_bias": {"258": 1}}, "logit_bias", None),
        ({"logit_bias": {"a": 1}}, "logit_bias", None),
        ({"logit_bias": {"1": 101}}, "logit_bias", None),
        ({"stop": ""}, "stop", None),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", None),
        ({"stop": [1]}, "stop", None),
        ({"stop_token_ids": [258]}, "stop_token_ids", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", None),
        ({"n": 0}, "n", None),
        ({"n": 129}, "n", None),
        ({"n": "two"}, "n", None),
        ({"logprobs": 5}, "logprobs", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", None),
        ({"prompt_logprobs": 21}, "prompt_logprobs", None),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", None),
        ({"truncate_prompt_tokens": 101}, "truncate_prompt_tokens", None),
        ({"thinking_token_budget": -2}, "thinking_token_budget", None),
        ({"reasoning_effort": "heroic"}, "reasoning_effort", None),
        ({"priority": 2**70}, "priority", None),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ],
    ids=str,
)
async def test_bad_chat_requests(
    client: httpx.AsyncClient,
    engine: Any,
    chat: Any,
    fields: dict[str, Any],
    param: str,
    code: str | None,
) -> None:
    for stream in (False, True):
        body = {"stream": stream} | chat(**fields)
        if "stream_options" in fields and stream:
            continue
        response = await client.post(CHAT, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert error["code"] == ("context_length_exceeded" if code == "too_long" else code)
        assert error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": "x" * 100}, "prompt"),
        ({"prompt": ["x", "x" * 100]}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "max_tokens": -1}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"prompt": ["x"] * 10, "n": 116}, "n"),
        ({"prompt": ["x"] * 1153}, "prompt"),
    ],
    ids=str,
)
async def test_bad_completion_requests(
    client: httpx.AsyncClient, engine: Any, completion: Any, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(COMPLETIONS, json=completion(**fields))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = sorted(
    {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, "suffix", "unknown"}
    - {"model"}
)


def test_no_input_is_our_mistake(app: FastAPI, engine: Any, client_for: Any) -> None:
    engine.say("x")
    headers = {"content-type": "application/json"}

    async def ask(fields: dict[str, Any]) -> list[httpx.Response]:
        bodies = {
            CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields,
            COMPLETIONS: {"model": "tiny", "prompt": "hi"} | fields,
        }
        async with client_for(app) as client:
            return [
                await client.post(path, content=json.dumps(body), headers=headers)
                for path, body in bodies.items()
            ]

    @settings(max_examples=200, deadline=None)
    @given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
    def check(fields: dict[str, Any]) -> None:
        for response in asyncio.run(ask(fields)):
            if response.status_code == 504:
                assert 0 < fields["timeout"] < 1
                continue
            assert response.status_code in (200, 400)
            if response.status_code == 400:
                assert response.json()["error"]["type"] == "invalid_request_error"

    check()


async def test_context_length_message(client: httpx.AsyncClient, completion: Any) -> None:
    response = await client.post(COMPLETIONS, json=completion(prompt="x" * 9, max_tokens=91))
    assert response.json()["error"] == {
        "message": "This model's maximum context length is 100 tokens, but the request has "
        "10 prompt tokens and 91 output tokens.",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "context_length_exceeded",
    }


async def test_output_may_fill_the_context(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    engine.say("x")
    for fields in ({"max_tokens": 90}, {}):
        body = completion(prompt="x" * 9, **fields)
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200
        assert engine.requests[-1][1].max_tokens == 90


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "The body is not valid JSON: Expecting property name enclosed in double quotes."),
        (b"[]", "The body must be a JSON object, sent as application/json."),
        (b"", "The body must be a JSON object, sent as application/json."),
        (b"\xff", "There was an error parsing the body"),
        (b"[" * 100_000, "There was an error parsing the body"),
    ],
    ids=["broken", "not an object", "empty", "not UTF-8", "too deep"],
)
async def test_malformed_json(client: httpx.AsyncClient, body: bytes, message: str) -> None:
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        (
            CHAT,
            r'{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}',
            400,
            "messages",
        ),
        (COMPLETIONS, r'{"model": "tiny", "prompt": "\udfff"}', 400, "prompt"),
        (COMPLETIONS, r'{"model": "\ud800", "prompt": "a"}', 404, "model"),
    ],
    ids=["messages", "prompt", "model"],
)
async def test_lone_surrogates(
    client: httpx.AsyncClient, path: str, fields: str, status: int, param: str
) -> None:
    """JSON can spell half a character; neither the tokenizer nor our own JSON can."""
    headers = {"content-type": "application/json"}
    response = await client.post(path, content=fields, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


async def test_json_sent_as_something_else(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


async def test_unknown_model(client: httpx.AsyncClient, chat: Any) -> None:
    response = await client.post(CHAT, json=chat(model="gpt-4o"))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
async def test_overload(client: httpx.AsyncClient, state: Any, chat: Any, stream: bool) -> None:
    state.admission.places.take("", 10_000)
    response = await client.post(CHAT, json=chat(stream=stream))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "10"
    assert response.json()["error"] == {
        "message": "The server's queue is full. Try again in 10 s.",
        "type": "rate_limit_error",
        "param": None,
        "code": "slow_down",
    }


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ([[65], EngineUnavailable("The engine died.")], 503, "server_is_overloaded"),
        ([[65], FinishReason.ERROR], 500, "generation_failed"),
        ([[65], FinishReason.ABORT], 500, "generation_failed"),
        ([[65]], 500, "generation_failed"),
    ],
    ids=["engine dies", "engine gives up", "engine aborts", "engine says nothing"],
)
async def test_engine_failures(
    client: httpx.AsyncClient, engine: Any, chat: Any, script: list[Any], status: int, code: str
) -> None:
    engine.script = script
    response = await client.post(CHAT, json=chat())
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("end", "status"),
    [(FailureCause.GRAMMAR, 400), (FailureCause.ENGINE, 500), (FinishReason.ABORT, 500)],
)
async def test_a_grammar_that_can_not_go_on_is_the_clients_and_nothing_else_is(
    client: httpx.AsyncClient,
    engine: Any,
    chat: Any,
    end: FailureCause | FinishReason,
    status: int,
) -> None:
    engine.script = [[65], end]
    grammar = {"structured_outputs": {"regex": "a+"}}
    response = await client.post(CHAT, json=chat(**grammar))
    assert response.status_code == status
    assert ("can't be enforced any further" in response.text) == (status == 400)


async def test_refused_prompt_aborts_its_siblings(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    engine.scripts_by_prompt = {(1,): [asyncio.Event()], (2,): [EngineUnavailable("gone")]}
    response = await client.post(COMPLETIONS, json=completion(prompt=[[1], [2]]))
    assert response.status_code == 503
    assert engine.ended[engine.request_ids[0]] is FinishReason.ABORT


@pytest.mark.parametrize("script", [[], [[65], [66]]], ids=["queued", "decoding"])
async def test_disconnect_aborts(
    connect: Any, engine: Any, chat: Any, state: Any, script: list[Any]
) -> None:
    engine.script = [*script, asyncio.Event()]
    connection = connect(CHAT, chat())
    await engine.begun.wait()
    connection.disconnect()
    await connection.task
    assert engine.ended == {engine.request_ids[0]: FinishReason.ABORT}
    assert await connection.status() == 499
    text = state.metrics.render()[0].decode()
    assert 'finished_reason="abort",model_name="tiny"} 1.0' in text


async def test_disconnect_aborts_every_choice(connect: Any, engine: Any, completion: Any) -> None:
    engine.script = [asyncio.Event()]
    connection = connect(COMPLETIONS, completion(prompt=["a", "b", "c"]))
    await engine.begun.wait()
    connection.disconnect()
    await connection.task
    assert list(engine.ended.values()) == [FinishReason.ABORT] * 3
