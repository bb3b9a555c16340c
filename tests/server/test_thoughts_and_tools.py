"""Thoughts, tool calls and grammars of chats, from the request to the JSON of the answer."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.messages import FinishReason
from bezel.engine.sampling_params import ThinkingBudget

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
THOUGHT = "<|channel>thought\nHmm.<channel|>"
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]


async def test_thought_and_answer(
    gemma4_client: Any, engine: Any, say: Any, chat: Any, gemma4_tokenizer: Any
) -> None:
    say(f"{THOUGHT}Hi<turn|>")
    answer = (await gemma4_client.post(CHAT, json=chat())).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "reasoning_content": "Hmm.",
        "reasoning": "Hmm.",
    }
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(gemma4_tokenizer.ids(f"{THOUGHT}Hi<turn|>"))
    assert 4 <= usage["completion_tokens_details"]["reasoning_tokens"] <= len("thought\nHmm.") + 2


async def test_thought_in_a_stream(
    gemma4_client: Any, engine: Any, say: Any, chat: Any, events_of: Any
) -> None:
    say(f"{THOUGHT}Hi<turn|>")
    response = await gemma4_client.post(CHAT, json=chat(stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in events_of(response.text)[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1:-3] == [{"reasoning_content": c, "reasoning": c} for c in "Hmm."]
    assert deltas[-3:] == [{"content": "H"}, {"content": "i"}, {}]


async def test_what_came_together_is_told_apart(
    gemma4_client: Any, engine: Any, gemma4_tokenizer: Any, chat: Any, events_of: Any
) -> None:
    """The tokens are told once, with the first of the chunks."""
    ids = gemma4_tokenizer.ids(f"{THOUGHT}Hi{CALL}")
    engine.script = [ids, FinishReason.STOP]
    body = chat(stream=True, tools=TOOLS, logprobs=True, return_token_ids=True)
    response = await gemma4_client.post(CHAT, json=body)
    choices = [chunk["choices"][0] for chunk in events_of(response.text)[:-1]]
    kinds = [name for choice in choices for name in choice["delta"]]
    opening, thought = ["role", "content"], ["reasoning_content", "reasoning"]
    assert kinds == [*opening, *thought, "content", *["tool_calls"] * kinds.count("tool_calls")]
    assert [len(choice["token_ids"]) for choice in choices if choice["token_ids"]] == [len(ids), 1]
    num_told = [len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]]
    assert num_told == [len(ids), 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_thought_that_nobody_wants_to_see(
    gemma4_client: Any, engine: Any, say: Any, chat: Any, events_of: Any, stream: bool
) -> None:
    say(f"{THOUGHT}Hi<turn|>")
    response = await gemma4_client.post(CHAT, json=chat(stream=stream, include_reasoning=False))
    assert "Hmm" not in response.text
    assert "reasoning_content" not in response.text
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in events_of(response.text)[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == "Hi"
    else:
        assert response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


async def test_calls(gemma4_client: Any, engine: Any, say: Any, chat: Any) -> None:
    say(f"{CALL}{CALL}<|tool_response>")
    answer = (await gemma4_client.post(CHAT, json=chat(tools=TOOLS))).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    for call in message["tool_calls"]:
        assert call["id"].startswith("call_")
        assert call["type"] == "function"
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "days": 2}


async def test_calls_in_a_stream(
    gemma4_client: Any, engine: Any, say: Any, chat: Any, events_of: Any
) -> None:
    say(f"Wait.{CALL}{CALL}<|tool_response>")
    response = await gemma4_client.post(CHAT, json=chat(tools=TOOLS, stream=True))
    choices = [chunk["choices"][0] for chunk in events_of(response.text)[:-1]]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1:6] == [{"content": c} for c in "Wait."]
    assert deltas[-1] == {}
    assert choices[-1]["finish_reason"] == "tool_calls"
    pieces = [piece for delta in deltas[6:-1] for piece in delta["tool_calls"]]
    for index in range(2):
        first, *others = [piece for piece in pieces if piece["index"] == index]
        assert first.pop("id").startswith("call_")
        assert first == {
            "index": index,
            "type": "function",
            "function": {"name": "get_weather", "arguments": ""},
        }
        assert {tuple(piece) for piece in others} == {("index", "function")}
        assert {tuple(piece["function"]) for piece in others} == {("arguments",)}
        arguments = "".join(piece["function"]["arguments"] for piece in others)
        assert json.loads(arguments) == {"city": "Paris", "days": 2}
    assert len(pieces) > 4, "arguments come as they are made"


@pytest.mark.parametrize(
    ("reason", "told", "arguments"),
    [
        (FinishReason.LENGTH, "length", '{"city":"Pa'),
        # The model itself left out what closes the call.
        (FinishReason.STOP, "tool_calls", '{"city":"Pa"}'),
    ],
    ids=["limit", "model"],
)
async def test_call_without_an_end(
    gemma4_client: Any, engine: Any, say: Any, chat: Any, reason: Any, told: str, arguments: str
) -> None:
    end = "<turn|>" if reason is FinishReason.STOP else ""
    say(CALL[: CALL.index("ris")] + end, reason)
    answer = (await gemma4_client.post(CHAT, json=chat(tools=TOOLS))).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == told
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("effort", "budget"), [("low", 1024), ("medium", 8192), ("high", None), (None, None)]
)
async def test_budget_reaches_the_engine(
    gemma4_client: Any, engine: Any, say: Any, chat: Any, effort: str | None, budget: int | None
) -> None:
    say("Hi<turn|>")
    response = await gemma4_client.post(CHAT, json=chat(reasoning_effort=effort))
    assert response.status_code == 200
    expected = budget and ThinkingBudget(
        num_tokens=budget, open_id=258, close_id=259, is_open=False
    )
    assert engine.requests[0][1].thinking_budget == expected


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_grammar_is_checked_and_reaches_the_engine(
    gemma4_client: Any,
    engine: Any,
    say: Any,
    chat: Any,
    completion: Any,
    grammars: Any,
    route: str,
) -> None:
    say("ab<turn|>")
    fields = {"structured_outputs": {"choice": ["ab", "cd"]}}
    body = chat(**fields) if route == CHAT else completion(**fields)
    assert (await gemma4_client.post(route, json=body)).status_code == 200
    grammar = engine.requests[0][1].grammar
    assert "ab" in grammar
    assert grammars.checked == [grammar]
    grammars.refuses = True
    response = await gemma4_client.post(route, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["param"] == "structured_outputs.choice"
    assert len(engine.requests) == 1


PIECES = st.sampled_from(
    [
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "thought\n"),
        *("a", "é", "🙂", " ", "\n", "END", "call:f{", "x:", "1", ",", "}", "{", "[", "]", "tru"),
        *(THOUGHT, CALL),
    ]
)


def test_stream_equals_whole_answer(
    gemma4_app: FastAPI, engine: Any, client_for: Any, events_of: Any, gemma4_tokenizer: Any
) -> None:
    @settings(max_examples=200, deadline=None)
    @given(
        pieces=st.lists(PIECES, min_size=1, max_size=10),
        chunks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
        fields=st.fixed_dictionaries(
            {"n": st.sampled_from([1, 2])},
            optional={
                "stop": st.sampled_from(["END", ["a", "1"]]),
                "logprobs": st.just(True),
                "tools": st.just(TOOLS),
                "include_reasoning": st.booleans(),
                "return_token_ids": st.booleans(),
                "skip_special_tokens": st.booleans(),
                "include_stop_str_in_output": st.booleans(),
            },
        ),
    )
    def check(
        pieces: list[str], chunks: tuple[int, int], reason: FinishReason, fields: dict[str, Any]
    ) -> None:
        ids = gemma4_tokenizer.ids("".join(pieces))

        async def ask(chunk: int, **more: Any) -> httpx.Response:
            engine.script = [ids[i : i + chunk] for i in range(0, len(ids), chunk)] + [reason]
            body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]} | fields | more
            async with client_for(gemma4_app) as client:
                return await client.post(CHAT, json=body)

        whole = asyncio.run(ask(chunks[0])).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *events, usage, _ = events_of(asyncio.run(ask(chunks[1], **options)).text)
        assert usage["usage"] == whole["usage"]
        for choice in whole["choices"]:
            own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
            message = choice["message"]
            for name in ("content", "reasoning_content", "reasoning"):
                told = "".join(c["delta"].get(name) or "" for c in own)
                assert told == (message.get(name) or ""), name
            assert streamed_calls(own) == [
                (call["function"]["name"], call["function"]["arguments"])
                for call in message.get("tool_calls", ())
            ]
            logprobs = choice["logprobs"] and choice["logprobs"]["content"]
            told = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert told == (logprobs or [])
            told = [i for c in own for i in c.get("token_ids", ())]
            assert told == choice.get("token_ids", [])
            assert own[-1]["finish_reason"] == choice["finish_reason"]
            assert own[-1]["delta"] == {}

    check()


def streamed_calls(choices: list[Any]) -> list[tuple[str, str]]:
    """Names and arguments, put together as OpenAI's clients do."""
    calls: list[tuple[str, str]] = []
    for choice in choices:
        for piece in choice["delta"].get("tool_calls", ()):
            function = piece["function"]
            if piece["index"] == len(calls):
                calls.append((function["name"], ""))
            name, arguments = calls[piece["index"]]
            calls[piece["index"]] = (name, arguments + function["arguments"])
    return calls


async def test_the_engine_hears_where_the_preamble_ends(
    gemma4_client: Any,
    engine: Any,
    say: Any,
    chat: Any,
    gemma4_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preamble = gemma4_tokenizer.ids("<bos><|turn>system\nBe kind.<turn|>\n")
    prompt = [*preamble, *gemma4_tokenizer.ids("<|turn>user\nHello<turn|>\n")]
    monkeypatch.setattr(gemma4_tokenizer, "render_chat", lambda *_, **__: prompt)
    say("x<turn|>")
    await gemma4_client.post(CHAT, json=chat())
    await gemma4_client.post(CHAT, json=chat(truncate_prompt_tokens=9))
    (_, whole), (_, cut) = engine.requests
    assert whole.num_preamble_tokens == len(preamble)
    assert cut.num_preamble_tokens == 0
