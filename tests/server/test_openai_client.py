"""The real OpenAI client, sync and async, over real sockets against the fake engine."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from bezel.engine.errors import EngineUnavailable, Overloaded

pytestmark = pytest.mark.anyio

MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def base_url(app: FastAPI) -> Iterator[str]:
    """A server on a port of its own, in a thread, until the test is over."""
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


def test_errors_have_their_classes(client: openai.OpenAI, engine: Any) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"
    engine.refusal = Overloaded("The queue is full.", retry_after_s=1)
    with pytest.raises(openai.RateLimitError) as overload:
        client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert overload.value.code == "slow_down"


def test_error_in_a_stream_is_raised(client: openai.OpenAI, engine: Any) -> None:
    engine.script = [[65], EngineUnavailable("The engine died.")]
    stream = client.completions.create(model="tiny", prompt="a", stream=True)
    assert next(stream).choices[0].text == "A"
    with pytest.raises(openai.APIError, match=r"The engine died\."):
        next(stream)


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
