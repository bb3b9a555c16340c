"""Several choices of one prompt: seeds, order, usage, limits."""

import asyncio
from typing import Any

import httpx
import pytest

from bezel.engine.messages import FinishReason

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


async def test_choices_of_several_prompts(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    engine.scripts_by_prompt = {
        (1,): [[*b"A"], FinishReason.LENGTH],
        (2, 3): [[*b"BC"], FinishReason.LENGTH],
    }
    body = completion(prompt=[[1], [2, 3]], n=3, best_of=3, seed=5, echo=False)
    answer = (await client.post(COMPLETIONS, json=body)).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        *((i, "A") for i in range(3)),
        *((i, "BC") for i in range(3, 6)),
    ]
    assert [params.seed for _, params in engine.requests] == [5, 6, 7, 5, 6, 7]
    assert len(set(engine.request_ids)) == 6
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 3 * 1 + 3 * 2


async def test_choices_without_a_seed(client: httpx.AsyncClient, engine: Any, chat: Any) -> None:
    engine.say("x")
    answer = (await client.post(CHAT, json=chat(n=2))).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["x", "x"]
    assert [params.seed for _, params in engine.requests] == [None, None]


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_every_choice_of_a_stream_has_its_own_chunks(
    client: httpx.AsyncClient,
    engine: Any,
    chat: Any,
    completion: Any,
    events_of: Any,
    route: str,
) -> None:
    engine.say("ab")
    body = {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    body = chat(**body) if route == CHAT else completion(**body)
    *chunks, usage, done = events_of((await client.post(route, json=body)).text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    choices = [chunk["choices"][0] for chunk in chunks]
    # All run at the same time, so that their chunks come in turns.
    first_end = [choice["finish_reason"] for choice in choices].index("stop")
    assert {choice["index"] for choice in choices[:first_end]} == {0, 1, 2}
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
        if route == CHAT:
            deltas = [choice["delta"] for choice in own]
            role = {"role": "assistant", "content": ""}
            assert deltas == [role, {"content": "a"}, {"content": "b"}, {}]
        else:
            assert [choice["text"] for choice in own] == ["a", "b", ""]
    num_prompt_tokens = len(engine.requests[0][0])
    assert usage["usage"]["prompt_tokens"] == num_prompt_tokens
    assert usage["usage"]["total_tokens"] == num_prompt_tokens + 3 * 3


async def test_choices_end_on_their_own(
    client: httpx.AsyncClient, engine: Any, chat: Any, events_of: Any
) -> None:
    """One choice goes on after the other has finished."""
    engine.say("x")
    engine.scripts = [[[65], FinishReason.STOP], [[66], [67], [68], FinishReason.LENGTH]]
    response = await client.post(CHAT, json=chat(n=2, stream=True))
    choices = [chunk["choices"][0] for chunk in events_of(response.text)[:-1]]
    ends = {c["index"]: c["finish_reason"] for c in choices if c["finish_reason"]}
    texts = [
        "".join(c["delta"].get("content") or "" for c in choices if c["index"] == index)
        for index in range(2)
    ]
    assert ends == {0: "stop", 1: "length"}
    assert texts == ["A", "BCD"]


async def test_usage_so_far_in_every_chunk(
    client: httpx.AsyncClient, engine: Any, chat: Any, events_of: Any
) -> None:
    engine.say("abc", FinishReason.LENGTH)
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await client.post(CHAT, json=chat(stream=True, stream_options=options))
    *chunks, _ = events_of(response.text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [1, 1, 2, 3, 3, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {19}


async def test_most_choices_that_can_be(
    client: httpx.AsyncClient, engine: Any, chat: Any, completion: Any
) -> None:
    engine.say("x")
    assert (await client.post(CHAT, json=chat(n=128))).status_code == 200
    # As many as may run and wait with the engine's default settings.
    body = completion(prompt=["x"] * 12, n=96)
    assert len((await client.post(COMPLETIONS, json=body)).json()["choices"]) == 1152
    response = await client.post(COMPLETIONS, json=completion(prompt=["x"] * 12, n=97))
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "A request may ask for at most 1152 choices in all, not 1164."
    )


async def test_disconnect_aborts_every_choice(connect: Any, engine: Any, chat: Any) -> None:
    engine.script = [asyncio.Event()]
    connection = connect(CHAT, chat(n=3, stream=True))
    assert await connection.status() == 200
    connection.disconnect()
    await connection.task
    assert list(engine.ended.values()) == [FinishReason.ABORT] * 3


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("limit", "max_tokens", "expected"),
    [
        (3, 5, [256, 8, 9]),
        (1, 5, [256]),
        (9, 5, [256, *range(2, 10)]),
        (50, 5, [256, *range(1, 10)]),
        (-1, 5, [256, *range(1, 10)]),
        (-1, 97, [256, 8, 9]),
        (-1, 100, [256]),
    ],
)
async def test_truncated_prompts(
    client: httpx.AsyncClient,
    engine: Any,
    chat: Any,
    completion: Any,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Any,
    route: str,
    limit: int,
    max_tokens: int,
    expected: list[int],
) -> None:
    """The end of the prompt is kept, and <bos>."""
    engine.say("x")
    prompt = [256, *range(1, 10)]
    monkeypatch.setattr(tokenizer, "render_chat", lambda *_, **__: prompt)
    fields = {"truncate_prompt_tokens": limit, "max_tokens": max_tokens}
    body = chat(**fields) if route == CHAT else completion(prompt=prompt, **fields)
    response = await client.post(route, json=body)
    if len(expected) + max_tokens > 100:
        assert response.json()["error"]["code"] == "context_length_exceeded"
        return
    assert engine.requests[0][0] == expected
    assert response.json()["usage"]["prompt_tokens"] == len(expected)


async def test_truncation_without_bos(
    client: httpx.AsyncClient, engine: Any, completion: Any
) -> None:
    engine.say("x")
    body = completion(prompt=[1, 2, 3, 4], truncate_prompt_tokens=2)
    await client.post(COMPLETIONS, json=body)
    assert engine.requests[0][0] == [3, 4]
