"""Requests → prompt token ids, without holding up the event loop."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from bezel.engine.errors import InvalidRequest
from bezel.engine.tokenizer import Tokenizer
from bezel.server.chat import template_messages
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest

T = TypeVar("T")

# Up to here tokenizing takes about a millisecond, no more than the change of threads is worth.
_MAX_CHARS_ON_LOOP = 8192
# What the template is given by us; a request must not put its own in their place.
_RESERVED_KWARGS = frozenset({"messages", "tools", "add_generation_prompt"})


async def chat_prompt(
    tokenizer: Tokenizer, request: ChatCompletionRequest, vocab_size: int
) -> list[int]:
    """Render the messages with the checkpoint's template, up to where the model answers.

    Raises:
        InvalidRequest: the template refuses the messages, or they aren't valid text.
    """
    messages = template_messages(request.messages)
    template_kwargs = request.chat_template_kwargs or {}
    if reserved := _RESERVED_KWARGS & template_kwargs.keys():
        name = f"chat_template_kwargs.{min(reserved)}"
        raise InvalidRequest(f"{name} can't be set.", name)
    token_ids = await _off_loop(
        sum(len(message["content"]) for message in messages),
        "messages",
        lambda: tokenizer.render_chat(messages, template_kwargs=template_kwargs),
    )
    _check_token_ids(token_ids, vocab_size, "messages")
    return token_ids


async def completion_prompts(
    tokenizer: Tokenizer, request: CompletionRequest, vocab_size: int
) -> list[list[int]]:
    """The token ids of every prompt.

    Raises:
        InvalidRequest: a prompt is empty, isn't valid text or holds an unknown token id.
    """
    prompts: list[Any] = list(request.prompt)
    if isinstance(prompts[0], str):
        if "" in prompts:
            raise InvalidRequest("prompt must not be empty.", "prompt")
        texts, num_chars = prompts, sum(map(len, prompts))
        prompts = await _off_loop(
            num_chars, "prompt", lambda: [tokenizer.encode(text) for text in texts]
        )
    for token_ids in prompts:
        _check_token_ids(token_ids, vocab_size, "prompt")
    return prompts


def _check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Of texts too: Gemma 3's tokenizer knows an image token that its text models don't."""
    if not token_ids:
        raise InvalidRequest(f"{param} must not be empty.", param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise InvalidRequest(f"{param} holds a token id outside 0 to {vocab_size - 1}.", param)


async def _off_loop(num_chars: int, param: str, tokenize: Callable[[], T]) -> T:
    try:
        if num_chars <= _MAX_CHARS_ON_LOOP:
            return tokenize()
        return await asyncio.to_thread(tokenize)
    except InvalidRequest as error:
        # The tokenizer can't know where the text came from.
        error.param = error.param or param
        raise
