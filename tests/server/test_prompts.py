"""Where tokenizing happens, and what it refuses."""

import threading
from typing import Any

import pytest

from bezel.engine.errors import InvalidRequest
from bezel.server.prompts import chat_prompt, completion_prompts
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest

pytestmark = pytest.mark.anyio


@pytest.fixture
def threads(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads in which texts were tokenized."""
    threads = []
    encode = tokenizer.encode

    def encode_and_note(text: str, add_special_tokens: bool = True) -> list[int]:
        threads.append(threading.current_thread())
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", encode_and_note)
    return threads


@pytest.mark.parametrize(("num_chars", "on_loop"), [(8192, True), (8193, False)])
async def test_long_prompts_leave_the_event_loop(
    tokenizer: Any, threads: list[threading.Thread], num_chars: int, on_loop: bool
) -> None:
    request = CompletionRequest(model="tiny", prompt=["x" * (num_chars - 1), "y"])
    prompts = await completion_prompts(tokenizer, request, 258)
    assert prompts == [[256, *b"x" * (num_chars - 1)], [256, *b"y"]]
    messages = [{"role": "user", "content": "x" * num_chars}]
    request = ChatCompletionRequest(model="tiny", messages=messages)
    assert len(await chat_prompt(tokenizer, request, 258)) == 1 + num_chars + len(
        "user:\nassistant:"
    )
    assert [thread is threading.current_thread() for thread in threads] == [on_loop] * 3


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
async def test_template_kwargs_can_not_replace_ours(tokenizer: Any, name: str) -> None:
    request = ChatCompletionRequest(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        chat_template_kwargs={"x": 1, name: []},
    )
    with pytest.raises(InvalidRequest) as error:
        await chat_prompt(tokenizer, request, 258)
    assert error.value.param == f"chat_template_kwargs.{name}"


async def test_every_token_id_is_checked(tokenizer: Any) -> None:
    request = CompletionRequest(model="tiny", prompt=[[0, 9], [3, 10]])
    assert await completion_prompts(tokenizer, request, 11) == [[0, 9], [3, 10]]
    with pytest.raises(InvalidRequest, match="outside 0 to 9"):
        await completion_prompts(tokenizer, request, 10)


async def test_so_are_the_token_ids_of_texts(tokenizer: Any) -> None:
    """A tokenizer may know tokens that the model has no embedding for."""
    request = CompletionRequest(model="tiny", prompt="ab")
    assert await completion_prompts(tokenizer, request, 257) == [[256, 97, 98]]
    with pytest.raises(InvalidRequest, match="outside 0 to 255"):
        await completion_prompts(tokenizer, request, 256)
    messages = [{"role": "user", "content": "ab"}]
    chat = ChatCompletionRequest(model="tiny", messages=messages)
    with pytest.raises(InvalidRequest, match="messages holds a token id outside 0 to 255"):
        await chat_prompt(tokenizer, chat, 256)
