"""Streams: exact chunk sequences, keep-alive, errors, disconnects; a stream equals its whole."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.errors import EngineUnavailable
from bezel.engine.messages import FinishReason
from bezel.server.version import SYSTEM_FINGERPRINT

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def heads_and_rest(chunks: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split what all chunks share from what makes each of them."""
    shared = ("id", "object", "created", "model", "system_fingerprint")
    heads = [{name: chunk[name] for name in shared} for chunk in chunks]
    rest = [{k: v for k, v in chunk.items() if k not in shared} for chunk in chunks]
    return heads, rest


def chat_choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {"choices": [choice]}


def text_choice(text: str, finish_reason: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return {"choices": [choice]}


async def test_chat_stream(
    client: httpx.AsyncClient, engine: Any, chat: Any, events_of: Any
) -> None:
    engine.say("Hé!")
    response = await client.post(CHAT, json=chat(stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = events_of(response.text)
    heads, rest = heads_and_rest(chunks)
    assert rest == [
        chat_choice({"role": "assistant", "content": ""}),
        chat_choice({"content": "H"}),
        chat_choice({"content": "é!"}),
        chat_choice({}, "stop"),
    ]
    assert done == "[DONE]"
    assert all(head == heads[0] for head in heads)
    assert heads[0].pop("id").startswith("chatcmpl-")
    assert heads[0].pop("created") > 0
    assert heads[0] == {
        "object": "chat.completion.chunk",
        "model": "tiny",
        "system_fingerprint": SYSTEM_FINGERPRINT,
    }


async def test_chat_stream_with_usage(
    client: httpx.AsyncClient, engine: Any, chat: Any, events_of: Any
) -> None:
    engine.say("Hi", FinishReason.LENGTH)
    body = chat(stream=True, stream_options={"include_usage": True})
    *chunks, done = events_of((await client.post(CHAT, json=body)).text)
    assert heads_and_rest(chunks)[1] == [
        chat_choice({"role": "assistant", "content": ""}) | {"usage": None},
        chat_choice({"content": "H"}) | {"usage": None},
        chat_choice({"content": "i"}) | {"usage": None},
        chat_choice({}, "length") | {"usage": None},
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 19,
                "completion_tokens": 2,
                "total_tokens": 21,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        },
    ]
    assert done == "[DONE]"


async def test_completion_stream(
    client: httpx.AsyncClient, engine: Any, completion: Any, events_of: Any
) -> None:
    engine.say("Hi")
    response = await client.post(COMPLETIONS, json=completion(stream=True))
    *chunks, done = events_of(response.text)
    heads, rest = heads_and_rest(chunks)
    assert rest == [text_choice("H"), text_choice("i"), text_choice("", "stop")]
    assert done == "[DONE]"
    assert heads[0]["object"] == "text_completion"
    assert heads[0]["id"].startswith("cmpl-")


async def test_completion_stream_of_several_prompts(
    client: httpx.AsyncClient, engine: Any, completion: Any, events_of: Any
) -> None:
    engine.scripts_by_prompt = {
        (1,): [[*b"A"], [*b"B"], FinishReason.LENGTH],
        (2,): [[*b"C"], FinishReason.STOP],
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(COMPLETIONS, json=completion(prompt=[[1], [2]], **options))
    *chunks, usage, _ = events_of(response.text)
    by_index: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_index[choice["index"]].append((choice["text"], choice["finish_reason"]))
    assert by_index == {
        0: [("A", None), ("B", None), ("", "length")],
        1: [("C", None), ("", "stop")],
    }
    assert usage["usage"]["total_tokens"] == 2 + 2 + 2


async def test_token_ids_in_chat_stream(
    client: httpx.AsyncClient, engine: Any, chat: Any, events_of: Any
) -> None:
    engine.say("Hé")
    response = await client.post(CHAT, json=chat(stream=True, return_token_ids=True))
    chunks = events_of(response.text)[:-1]
    assert chunks[0]["prompt_token_ids"] == [256, *b"user:hi\nassistant:"]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    pieces = [
        (c["choices"][0]["delta"].get("content"), c["choices"][0]["token_ids"]) for c in chunks
    ]
    empty = [(None, [0xC3]), (None, [0xA9])]
    assert pieces == [("", []), ("H", [72]), *empty, ("é", [257]), (None, [])]


async def test_token_ids_in_completion_stream(
    client: httpx.AsyncClient, engine: Any, completion: Any, events_of: Any
) -> None:
    engine.say("Hi")
    body = completion(prompt=[7, 8], stream=True, return_token_ids=True)
    choices = [
        chunk["choices"][0]
        for chunk in events_of((await client.post(COMPLETIONS, json=body)).text)[:-1]
    ]
    assert choices[0]["prompt_token_ids"] == [7, 8]
    assert all("prompt_token_ids" not in choice for choice in choices[1:])
    pieces = [(choice["text"], choice["token_ids"]) for choice in choices]
    assert pieces == [("", []), ("H", [72]), ("i", [105]), ("", [257]), ("", [])]


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "num_tokens"),
    [
        ({"stop": "END"}, "one two ", 11),
        ({"stop": ["two", "END"]}, "one ", 7),
        ({"stop": ["END"], "include_stop_str_in_output": True}, "one two END", 11),
    ],
    ids=["one", "the first of two", "included"],
)
async def test_stop_strings(
    client: httpx.AsyncClient,
    engine: Any,
    completion: Any,
    events_of: Any,
    chunk: int,
    stream: bool,
    fields: dict[str, Any],
    text: str,
    num_tokens: int,
) -> None:
    engine.say("one two END three", chunk=chunk)
    if stream:
        fields = fields | {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(COMPLETIONS, json=completion(**fields))
    if stream:
        *chunks, last, _ = events_of(response.text)
        choices = [c["choices"][0] for c in chunks]
        assert "".join(choice["text"] for choice in choices) == text
        assert choices[-1]["finish_reason"] == "stop"
    else:
        last = response.json()
        assert last["choices"][0]["text"] == text
        assert last["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == num_tokens
    assert engine.ended == {engine.request_ids[0]: FinishReason.STOP}


async def test_beginning_of_a_stop_string_is_given_out_in_the_end(
    client: httpx.AsyncClient, engine: Any, chat: Any, events_of: Any
) -> None:
    engine.say("nearly EN", FinishReason.LENGTH)
    response = await client.post(CHAT, json=chat(stop="END", stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in events_of(response.text)[:-1]]
    assert [d.get("content") for d in deltas] == ["", *"nearly ", "EN", None]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_that_only_the_end_makes_certain(
    client: httpx.AsyncClient, engine: Any, completion: Any, events_of: Any, stream: bool
) -> None:
    """The bytes of "é" could have gone on to be another character."""
    engine.say("café", FinishReason.LENGTH)
    response = await client.post(COMPLETIONS, json=completion(stop="é", stream=stream))
    answers = events_of(response.text)[:-1] if stream else [response.json()]
    choices = [answer["choices"][0] for answer in answers]
    assert "".join(choice["text"] for choice in choices) == "caf"
    assert choices[-1]["finish_reason"] == "stop"


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab<é🙂"), max_size=12),
    chunks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stop=st.lists(st.text(st.sampled_from("ab<é"), min_size=1, max_size=3), max_size=2),
    reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
)
def test_stream_equals_whole_answer(
    new_engine: Any,
    new_app: Any,
    client_for: Any,
    events_of: Any,
    text: str,
    chunks: tuple[int, int],
    stop: list[str],
    reason: FinishReason,
) -> None:
    async def ask(chunk: int, **fields: Any) -> httpx.Response:
        engine = new_engine()
        engine.say(text, reason, chunk)
        body = {"model": "tiny", "prompt": "hi", "stop": stop, "return_token_ids": True}
        async with client_for(new_app(engine)) as client:
            return await client.post(COMPLETIONS, json=body | fields)

    whole = asyncio.run(ask(chunks[0])).json()["choices"][0]
    streamed = asyncio.run(ask(chunks[1], stream=True))
    choices = [chunk["choices"][0] for chunk in events_of(streamed.text)[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [i for choice in choices for i in choice["token_ids"]] == whole["token_ids"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]


async def test_status_is_sent_before_the_first_token(connect: Any, engine: Any, chat: Any) -> None:
    token_comes = asyncio.Event()
    engine.script = [token_comes, [65], FinishReason.STOP]
    connection = connect(CHAT, chat(stream=True))
    assert await connection.status() == 200
    token_comes.set()
    assert b'"role":"assistant"' in (await connection.next())["body"]


async def test_keep_alive_while_queued(connect: Any, engine: Any, chat: Any, state: Any) -> None:
    # Any silence is long enough, so that nobody has to wait for it.
    object.__setattr__(state.config, "sse_keep_alive_interval", 0)
    token_comes = asyncio.Event()
    engine.script = [token_comes, [65], FinishReason.STOP]
    connection = connect(CHAT, chat(stream=True))
    assert await connection.status() == 200
    for _ in range(3):
        assert (await connection.next())["body"] == b": keep-alive\n\n"
    token_comes.set()
    bodies = [message["body"] async for message in rest_of(connection)]
    chunks = [body for body in bodies if body and body != b": keep-alive\n\n"]
    assert b'"content":"A"' in chunks[1]
    assert chunks[-1] == b"data: [DONE]\n\n"
    assert engine.ended == {engine.request_ids[0]: FinishReason.STOP}


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (EngineUnavailable("The engine died."), "server_is_overloaded"),
        (FinishReason.ERROR, "generation_failed"),
        (ZeroDivisionError("secret"), "internal_error"),
    ],
    ids=["engine dies", "engine gives up", "our mistake"],
)
async def test_error_in_the_stream(
    client: httpx.AsyncClient, engine: Any, chat: Any, events_of: Any, failure: Any, code: str
) -> None:
    engine.script = [[65], asyncio.Event(), failure]
    engine.script[1].set()
    response = await client.post(CHAT, json=chat(stream=True))
    assert response.status_code == 200
    *chunks, error = events_of(response.text)
    assert [c["choices"][0]["delta"] for c in chunks][-1] == {"content": "A"}
    assert error["error"]["code"] == code
    assert "secret" not in error["error"]["message"]


@pytest.mark.parametrize("script", [[], [[65]]], ids=["queued", "decoding"])
async def test_disconnect_aborts(connect: Any, engine: Any, chat: Any, script: list[Any]) -> None:
    engine.script = [*script, asyncio.Event()]
    connection = connect(CHAT, chat(stream=True))
    assert await connection.status() == 200
    for _ in script:
        await connection.next()
    connection.disconnect()
    await connection.task
    assert engine.ended == {engine.request_ids[0]: FinishReason.ABORT}


async def test_disconnect_of_a_slow_reader_aborts(app: Any, engine: Any, chat: Any) -> None:
    """The app is then in the middle of sending, not of waiting for tokens."""
    engine.script = [[65], asyncio.Event()]
    sending, gone = asyncio.Event(), asyncio.Event()
    parts = [{"type": "http.request", "body": json.dumps(chat(stream=True)).encode()}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            sending.set()
            await asyncio.Event().wait()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    task = asyncio.create_task(app(scope | {"query_string": b""}, receive, send))
    await sending.wait()
    gone.set()
    await task
    assert engine.ended == {engine.request_ids[0]: FinishReason.ABORT}


async def rest_of(connection: Any) -> Any:
    while True:
        message = await connection.next()
        yield message
        if not message.get("more_body"):
            return
