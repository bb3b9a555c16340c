"""The real OpenAI client, sync and async, over real sockets against the fake engine."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from bezel.engine.errors import EngineUnavailable
from bezel.engine.messages import FinishReason

pytestmark = pytest.mark.anyio

MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def base_url(app: FastAPI) -> Iterator[str]:
    """A server on a port of its own, in a thread, until the test is over."""
    yield from serve(app)


@pytest.fixture
def gemma4_url(engine: Any, gemma4_app: FastAPI) -> Iterator[str]:
    """One whose model thinks and calls tools."""
    yield from serve(gemma4_app)


def serve(app: FastAPI) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        thread = threading.Thread(target=asyncio.run, args=[server.serve([sock])], daemon=True)
        thread.start()
        # The socket listens already: a client that comes too early just waits for its answer.
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI, engine: Any) -> None:
    engine.say("Hello")
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream(client: openai.OpenAI, engine: Any) -> None:
    engine.say("Hello")
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_completion(client: openai.OpenAI, engine: Any) -> None:
    engine.say("Hello")
    answer = client.completions.create(model="tiny", prompt=["a", "b"])
    assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]


def test_completion_stream(client: openai.OpenAI, engine: Any) -> None:
    engine.say("Hello")
    stream = client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_have_their_classes(client: openai.OpenAI, state: Any) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"
    state.admission.places.take("", 10_000)
    with pytest.raises(openai.RateLimitError) as overload:
        client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert overload.value.code == "slow_down"


def test_error_in_a_stream_is_raised(client: openai.OpenAI, engine: Any) -> None:
    engine.script = [[65], EngineUnavailable("The engine died.")]
    stream = client.completions.create(model="tiny", prompt="a", stream=True)
    assert next(stream).choices[0].text == "A"
    with pytest.raises(openai.APIError, match=r"The engine died\."):
        next(stream)


def test_choices_and_logprobs(client: openai.OpenAI, engine: Any) -> None:
    engine.say("Hé")
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=2, seed=3, logprobs=True, top_logprobs=2
    )
    assert [choice.message.content for choice in answer.choices] == ["Hé", "Hé"]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        told = choice.logprobs.content
        assert b"".join(bytes(token.bytes or ()) for token in told).decode() == "Hé"
        assert [len(token.top_logprobs) for token in told] == [2] * 4
    assert [params.seed for _, params in engine.requests] == [3, 4]


def test_echo_with_logprobs(client: openai.OpenAI, engine: Any) -> None:
    engine.say("b", FinishReason.LENGTH)
    answer = client.completions.create(
        model="tiny", prompt="a", echo=True, logprobs=1, max_tokens=1
    )
    (choice,) = answer.choices
    assert choice.text == "ab"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["<bos>", "a", "b"]
    assert choice.logprobs.token_logprobs == [None, -97 / 64, -98 / 64]
    assert choice.logprobs.text_offset == [0, 0, 1]


def test_extra_body(client: openai.OpenAI, engine: Any) -> None:
    engine.say("x")
    extra = {"top_k": 7, "min_p": 0.25, "ignore_eos": True, "colour": "red"}
    response = client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, extra_body=extra
    )
    assert response.headers["x-ignored-params"] == "colour"
    params = engine.requests[0][1]
    assert (params.top_k, params.min_p, params.ignore_eos) == (7, 0.25, True)


def test_call_of_a_tool_and_its_result(gemma4_url: str, engine: Any, gemma4_tokenizer: Any) -> None:
    """The client's own objects go back into the conversation."""
    call = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>'
    *ids, stop = gemma4_tokenizer.ids(call)
    engine.scripts = [[ids, ([stop], FinishReason.STOP)]]
    engine.say("Sunny.")
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    messages: list[Any] = [*MESSAGES]
    with openai.OpenAI(base_url=gemma4_url, api_key="none", max_retries=0) as client:
        create = partial(client.chat.completions.create, model="tiny", tools=[tool])
        choice = create(messages=messages).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("get_weather", '{"city":"Paris"}')
        messages.append(choice.message)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "22 °C"})
        assert create(messages=messages).choices[0].message.content == "Sunny."


async def test_streamed_thought_and_call(
    gemma4_url: str, engine: Any, gemma4_tokenizer: Any
) -> None:
    text = "<|channel>thought\nHmm.<channel|>One moment.<|tool_call>call:f{x:1}<tool_call|>"
    *ids, stop = gemma4_tokenizer.ids(f"{text}<|tool_response>")
    engine.script = [*([i] for i in ids), ([stop], FinishReason.STOP)]
    tool: Any = {"type": "function", "function": {"name": "f"}}
    async with (
        openai.AsyncOpenAI(base_url=gemma4_url, api_key="none", max_retries=0) as client,
        client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=[tool]) as stream,
    ):
        kinds = [event.type async for event in stream]
        answer = await stream.get_final_completion()
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "One moment."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("f", '{"x":1}')
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds


async def test_async_chat_stream(base_url: str, engine: Any) -> None:
    engine.say("Hello")
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        texts = [chunk.choices[0].delta.content async for chunk in stream]
    assert texts == ["", *"Hello", None]


async def test_closing_an_async_stream_aborts(base_url: str, engine: Any) -> None:
    engine.script = [[65], asyncio.Event()]
    aborted = threading.Event()
    engine.on_abort = aborted.set
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        stream = await client.completions.create(model="tiny", prompt="a", stream=True)
        assert (await anext(aiter(stream))).choices[0].text == "A"
        await stream.close()
    assert await asyncio.to_thread(aborted.wait, 10)
