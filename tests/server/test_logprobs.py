"""Log-probabilities in all their shapes, streamed or not; echoed prompts."""

import asyncio
import math
import threading
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.messages import FinishReason
from bezel.server.completion_answer import CompletionAnswer
from bezel.server.logprobs import token_bytes, token_text

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def logprob(token_id: int) -> float:
    """What the fake engine says of a token."""
    return -token_id / 64


async def test_chat_logprobs(client: httpx.AsyncClient, engine: Any, chat: Any) -> None:
    engine.say("Aé")
    body = chat(logprobs=True, top_logprobs=2)
    choice = (await client.post(CHAT, json=body)).json()["choices"][0]
    assert choice["message"]["content"] == "Aé"

    def told(token: str, token_bytes: list[int] | None, logprob: float) -> dict[str, Any]:
        return {"token": token, "bytes": token_bytes, "logprob": logprob}

    assert choice["logprobs"] == {
        "content": [
            told("A", [65], logprob(65))
            | {"top_logprobs": [told("A", [65], -65 / 64), told("B", [66], -65 / 64 - 1)]},
            told("<0xC3>", [0xC3], -195 / 64)
            | {
                "top_logprobs": [
                    told("<0xC3>", [0xC3], -195 / 64),
                    told("<0xC4>", [0xC4], -195 / 64 - 1),
                ]
            },
            told("<0xA9>", [0xA9], -169 / 64)
            | {
                "top_logprobs": [
                    told("<0xA9>", [0xA9], -169 / 64),
                    told("<0xAA>", [0xAA], -169 / 64 - 1),
                ]
            },
            # What ended the sequence has been drawn too, and is no text.
            told("<eos>", None, -257 / 64)
            | {
                "top_logprobs": [
                    told("\x01", [1], -257 / 64),
                    told("\x02", [2], -257 / 64 - 1),
                ]
            },
        ],
        "refusal": None,
    }
    text = b"".join(bytes(token["bytes"] or ()) for token in choice["logprobs"]["content"])
    assert text.decode() == "Aé"


def test_bytes_that_are_characters_are_told_as_such(tokenizer: Any) -> None:
    tokenizer.byte_tokens = {10: 10, 200: 0xE2}
    assert (token_text(tokenizer, 10), token_bytes(tokenizer, 10, "\n")) == ("\n", [10])
    assert (token_text(tokenizer, 200), token_bytes(tokenizer, 200, "")) == ("<0xE2>", [0xE2])


async def test_chat_logprobs_of_the_drawn_alone(
    client: httpx.AsyncClient, engine: Any, chat: Any
) -> None:
    engine.say("A", FinishReason.LENGTH)
    choice = (await client.post(CHAT, json=chat(logprobs=True))).json()["choices"][0]
    (token,) = choice["logprobs"]["content"]
    assert token == {"token": "A", "bytes": [65], "logprob": -65 / 64, "top_logprobs": []}


async def test_completion_logprobs(client: httpx.AsyncClient, engine: Any, completion: Any) -> None:
    engine.say("Aé.")
    choice = (await client.post(COMPLETIONS, json=completion(logprobs=1))).json()["choices"][0]
    assert choice["text"] == "Aé."
    assert choice["logprobs"] == {
        "tokens": ["A", "<0xC3>", "<0xA9>", ".", "<eos>"],
        "token_logprobs": [-65 / 64, -195 / 64, -169 / 64, -46 / 64, -257 / 64],
        "top_logprobs": [
            {"A": -65 / 64},
            {"<0xC3>": -195 / 64},
            {"<0xA9>": -169 / 64},
            {".": -46 / 64},
            # The likeliest and the drawn token, which isn't one of them.
            {"\x01": -257 / 64, "<eos>": -257 / 64},
        ],
        "text_offset": [0, 1, 1, 1, 3],
    }


async def test_offsets_behind_a_character_in_bytes(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    engine.say("é.b", FinishReason.LENGTH)
    choice = (await client.post(COMPLETIONS, json=completion(logprobs=0))).json()["choices"][0]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 2]


async def test_offsets_with_and_without_control_tokens(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    for fields, offsets in (({}, [0, 0, 1]), ({"skip_special_tokens": False}, [0, 5, 6])):
        engine.script = [[256], [65], [66], FinishReason.LENGTH]
        body = completion(logprobs=0, **fields)
        choice = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
        assert choice["logprobs"]["text_offset"] == offsets
        assert choice["logprobs"]["tokens"] == ["<bos>", "A", "B"]


async def test_impossible_is_very_unlikely(
    client: httpx.AsyncClient, engine: Any, chat: Any, completion: Any
) -> None:
    engine.say("~", FinishReason.LENGTH)
    answer = (await client.post(CHAT, json=chat(logprobs=True, top_logprobs=1))).json()
    (token,) = answer["choices"][0]["logprobs"]["content"]
    assert (token["logprob"], token["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)
    body = completion(prompt="a~", logprobs=1, echo=True, prompt_logprobs=1)
    choice = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"][2:] == [-9999.0, -9999.0]
    assert choice["logprobs"]["top_logprobs"][2:] == [{"~": -9999.0}] * 2
    assert choice["prompt_logprobs"][2]["126"]["logprob"] == -9999.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["aé", [256, *"aé".encode()]], ids=["text", "token ids"])
async def test_echo(
    client: httpx.AsyncClient,
    engine: Any,
    completion: Any,
    events_of: Any,
    prompt: Any,
    stream: bool,
) -> None:
    engine.say("b", FinishReason.LENGTH)
    body = completion(prompt=prompt, echo=True, stream=stream)
    response = await client.post(COMPLETIONS, json=body)
    if stream:
        choices = [chunk["choices"][0] for chunk in events_of(response.text)[:-1]]
        assert [choice["text"] for choice in choices] == ["aé", "b", ""]
        assert [choice["logprobs"] for choice in choices] == [None] * 3
    else:
        (choice,) = response.json()["choices"]
        assert (choice["text"], choice["logprobs"]) == ("aéb", None)
    assert engine.requests[0][1].prompt_logprobs is None


async def test_echo_shows_control_tokens_but_not_the_bos_in_front(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    engine.say("b", FinishReason.LENGTH)
    body = completion(prompt=[256, 65, 256, 66], echo=True, logprobs=0)
    choice = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
    assert choice["text"] == "A<bos>Bb"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 6, 7]


async def test_echo_with_logprobs(client: httpx.AsyncClient, engine: Any, completion: Any) -> None:
    engine.say("cd")
    body = completion(prompt="aé", echo=True, logprobs=1)
    choice = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
    assert choice["text"] == "aécd"
    ids = [97, 0xC3, 0xA9, 99, 100, 257]
    assert choice["logprobs"]["tokens"] == ["<bos>", "a", "<0xC3>", "<0xA9>", "c", "d", "<eos>"]
    assert choice["logprobs"]["token_logprobs"] == [None, *map(logprob, ids)]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"a": -97 / 64}]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 3, 4]
    assert engine.requests[0][1].prompt_logprobs == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_of_the_prompt_alone(
    client: httpx.AsyncClient, engine: Any, completion: Any, events_of: Any, stream: bool
) -> None:
    engine.script = [([65], FinishReason.LENGTH)]
    body = completion(prompt="abc", echo=True, logprobs=1, max_tokens=0, stream=stream)
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = await client.post(COMPLETIONS, json=body)
    if stream:
        opening, last, answer, _ = events_of(response.text)
        (choice,) = opening["choices"]
        assert choice["finish_reason"] is None
        (end,) = last["choices"]
        assert (end["text"], end["logprobs"], end["finish_reason"]) == ("", None, "length")
    else:
        answer = response.json()
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length"
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["<bos>", "a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, *map(logprob, b"abc")]
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["total_tokens"] == 4
    assert engine.requests[0][1].max_tokens == 1


async def test_end_of_sequence_is_not_told_where_no_token_is_wanted(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    engine.script = [FinishReason.STOP]
    body = completion(echo=True, max_tokens=0)
    choice = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")


async def test_prompt_logprobs_of_completions(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    engine.say("x")
    body = completion(prompt=[[5, 7], [9]], prompt_logprobs=2)
    first, second = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    assert first["prompt_logprobs"] == [
        None,
        {
            "7": {"logprob": -7 / 64, "rank": 1, "decoded_token": "\x07"},
            "8": {"logprob": -7 / 64 - 1, "rank": 2, "decoded_token": "\x08"},
        },
    ]
    assert second["prompt_logprobs"] == [None]
    assert first["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_logprobs_of_chats(
    client: httpx.AsyncClient, engine: Any, chat: Any, events_of: Any, stream: bool
) -> None:
    engine.say("x")
    body = chat(prompt_logprobs=0, n=2, stream=stream)
    response = await client.post(CHAT, json=body)
    answers = events_of(response.text)[:-1] if stream else [response.json()]
    told = [answer["prompt_logprobs"] for answer in answers if "prompt_logprobs" in answer]
    assert len(told) == 1
    prompt_ids = engine.requests[0][0]
    assert told[0][0] is None
    # Its rank isn't known where the likeliest weren't asked for.
    assert told[0][1:] == [
        {str(i): {"logprob": logprob(i), "rank": None, "decoded_token": chr(i)}}
        for i in prompt_ids[1:]
    ]


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_stream_equals_whole_answer(
    app: FastAPI, engine: Any, client_for: Any, events_of: Any, route: str
) -> None:
    @settings(max_examples=60, deadline=None)
    @given(
        text=st.text(st.sampled_from("ab~é🙂"), max_size=12),
        chunks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        stop=st.lists(st.text(st.sampled_from("ab~é"), min_size=1, max_size=3), max_size=2),
        reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
        fields=st.fixed_dictionaries(
            {"logprobs": st.sampled_from([None, 0, 2]), "n": st.sampled_from([1, 2])},
            optional={
                "echo": st.booleans(),
                "prompt_logprobs": st.integers(0, 2),
                "return_token_ids": st.booleans(),
                "max_tokens": st.integers(0, 20),
            },
        ),
    )
    def check(
        text: str,
        chunks: tuple[int, int],
        stop: list[str],
        reason: FinishReason,
        fields: dict[str, Any],
    ) -> None:
        async def ask(chunk: int, **more: Any) -> httpx.Response:
            engine.say(text, reason, chunk)
            body = {"model": "tiny", "stop": stop} | fields | more
            if route == CHAT:
                body["messages"] = [{"role": "user", "content": "é"}]
                if body.get("logprobs") is not None:
                    body |= {"top_logprobs": body["logprobs"], "logprobs": True}
                body = {k: v for k, v in body.items() if k not in ("echo", "max_tokens")}
            else:
                body["prompt"] = ["é~a", "b"]
            async with client_for(app) as client:
                return await client.post(route, json=body)

        whole = asyncio.run(ask(chunks[0]))
        streamed = asyncio.run(ask(chunks[1], stream=True, stream_options={"include_usage": True}))
        assert streamed.status_code == whole.status_code
        if whole.status_code == 400:
            assert fields.get("max_tokens") == 0
            assert not fields.get("echo")
            return
        answer = whole.json()
        *events, usage, _ = events_of(streamed.text)
        assert usage["usage"] == answer["usage"]
        assert folded(events) == folded([as_chunk(answer)])

    check()


def as_chunk(answer: dict[str, Any]) -> dict[str, Any]:
    choices = [
        {("delta" if key == "message" else key): value for key, value in choice.items()}
        for choice in answer["choices"]
    ]
    return answer | {"choices": choices}


def folded(chunks: list[dict[str, Any]]) -> dict[int | str, Any]:
    """All chunks as one value by choice: texts and lists are joined, other things replaced."""
    by_index: dict[int | str, Any] = {}
    for chunk in chunks:
        for name in ("prompt_logprobs", "prompt_token_ids"):
            if name in chunk:
                by_index[name] = chunk[name]
        for choice in chunk["choices"]:
            fold(by_index.setdefault(choice["index"], {}), choice)
    return by_index


def fold(into: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if value is None or value == [] or name in ("index", "role", "refusal"):
            continue
        if isinstance(value, dict):
            fold(into.setdefault(name, {}), value)
            if not into[name]:
                del into[name]
        elif isinstance(value, list | str) and name in into:
            into[name] += value
        else:
            into[name] = value


async def test_likelihoods_as_lm_eval_reads_them(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    """Its sum runs over `[len(context) : -1]`: the one token it asks for must be there."""
    engine.script = [FinishReason.STOP]
    context, continuation = [256, *b"ab"], [*b"cd"]
    body = completion(
        prompt=[context + continuation, context], max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    answer = (await client.post(COMPLETIONS, json=body)).json()
    first = answer["choices"][0]["logprobs"]
    scores = first["token_logprobs"][len(context) : -1]
    assert math.isclose(sum(scores), sum(map(logprob, continuation)))
    tops = first["top_logprobs"][len(context) : -1]
    assert [max(top.values()) for top in tops] == scores
    assert answer["choices"][1]["logprobs"]["token_logprobs"][len(context) : -1] == []


async def test_long_echoes(
    client: httpx.AsyncClient, engine: Any, completion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their JSON is made in a thread, so that streams go on meanwhile."""
    threads: set[int] = set()
    whole = CompletionAnswer.whole

    def whole_in_thread(answer: CompletionAnswer, choices: Any) -> Any:
        threads.add(threading.get_ident())
        return whole(answer, choices)

    monkeypatch.setattr(CompletionAnswer, "whole", whole_in_thread)
    engine.say("b", FinishReason.LENGTH)
    for n in (1, 4):
        body = completion(prompt=[256, *[97] * 80], echo=True, logprobs=0, n=n)
        choices = (await client.post(COMPLETIONS, json=body)).json()["choices"]
        assert [choice["text"] for choice in choices] == ["a" * 80 + "b"] * n
        assert choices[-1]["logprobs"]["text_offset"] == [0, *range(81)]
        assert (threading.get_ident() in threads) == (n == 1)
        threads.clear()
