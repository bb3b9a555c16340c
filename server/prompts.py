"""Requests → prompt token ids, without holding up the event loop."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from bezel.engine.errors import InvalidRequest
from bezel.engine.tokenizer import Tokenizer
from bezel.server.chat import Thinking, template_messages
from bezel.server.control_tokens import ControlTokens
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest
from bezel.server.tools import check_tool_choice, template_tools

T = TypeVar("T")

# Up to here tokenizing takes about a millisecond, no more than the change of threads is worth.
_MAX_CHARS_ON_LOOP = 8192
# What the template is given by us; a request must not put its own in their place.
_RESERVED_KWARGS = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize"),
    }
)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation, and whether a thought may or must come next.

    The first `num_preamble_tokens` are the system's turn, tools included: what the prompts of one
    application begin with. 0 if there is none, or none that can be told from the user's.
    """

    token_ids: list[int]
    thinking: Thinking
    num_preamble_tokens: int


async def chat_prompt(
    tokenizer: Tokenizer,
    control: ControlTokens | None,
    request: ChatCompletionRequest,
    vocab_size: int,
    default_template_kwargs: Mapping[str, Any],
) -> ChatPrompt:
    """Render the messages with the checkpoint's template, up to where the model answers.

    `control` is None for models without thoughts. `default_template_kwargs` count where the request
    says nothing.

    Raises:
        InvalidRequest: the messages or tools aren't what they should be, the template refuses them,
            or they aren't valid text.
    """
    template_kwargs = {**default_template_kwargs, **_template_kwargs(request)}
    _check_ending(request, control)
    token_ids = await _off_loop(
        [request.messages, request.tools, request.documents, template_kwargs],
        "messages",
        lambda: _render(tokenizer, request, template_kwargs),
    )
    check_token_ids(token_ids, vocab_size, "messages")
    continues = bool(request.continue_final_message)
    return ChatPrompt(
        token_ids,
        _thinking(token_ids, control, continues),
        _num_preamble_tokens(token_ids, tokenizer, control),
    )


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
        texts = prompts
        prompts = await _off_loop(
            texts, "prompt", lambda: [tokenizer.encode(text) for text in texts]
        )
    for token_ids in prompts:
        check_token_ids(token_ids, vocab_size, "prompt")
    return prompts


async def text_prompt(
    tokenizer: Tokenizer, text: str, vocab_size: int, add_special_tokens: bool
) -> list[int]:
    """The token ids of one text.

    Raises:
        InvalidRequest: it is empty, isn't valid text or holds a token the model doesn't know.
    """
    token_ids = await _off_loop(text, "prompt", lambda: tokenizer.encode(text, add_special_tokens))
    check_token_ids(token_ids, vocab_size, "prompt")
    return token_ids


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Of texts too: Gemma 3's tokenizer knows an image token that its text models don't.

    Raises:
        InvalidRequest: there are none, or the model has no embedding for one.
    """
    if not token_ids:
        raise InvalidRequest(f"{param} must not be empty.", param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise InvalidRequest(f"{param} holds a token id outside 0 to {vocab_size - 1}.", param)


def _template_kwargs(request: ChatCompletionRequest) -> dict[str, Any]:
    """What the request tells the template besides messages and tools."""
    kwargs: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        kwargs["reasoning_effort"] = request.reasoning_effort
        # Gemma thinks or doesn't: there are no degrees of it.
        kwargs["enable_thinking"] = request.reasoning_effort != "none"
    kwargs |= request.chat_template_kwargs or {}
    if request.documents:
        kwargs["documents"] = request.documents
    if reserved := _RESERVED_KWARGS & kwargs.keys():
        name = f"chat_template_kwargs.{min(reserved)}"
        raise InvalidRequest(f"{name} can't be set.", name)
    if not isinstance(kwargs.get("enable_thinking", False), bool):
        name = "chat_template_kwargs.enable_thinking"
        raise InvalidRequest(f"{name} must be a boolean.", name)
    return kwargs


def _check_ending(request: ChatCompletionRequest, control: ControlTokens | None) -> None:
    """Whether the last message can be continued, if that is asked for."""
    if not request.continue_final_message:
        return
    name = "continue_final_message"
    if request.add_generation_prompt:
        raise InvalidRequest(f"{name} and add_generation_prompt exclude each other.", name)
    last = request.messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise InvalidRequest(
            f"{name} needs a last message of role 'assistant', without tool_calls.", name
        )
    if control is None and not last.content and (last.reasoning or last.reasoning_content):
        raise InvalidRequest(f"{name}: this model has no thoughts to continue.", name)


def _render(
    tokenizer: Tokenizer, request: ChatCompletionRequest, template_kwargs: Mapping[str, Any]
) -> list[int]:
    tools = template_tools(request.tools or ())
    check_tool_choice(request.tool_choice, tools)
    messages = template_messages(request.messages)
    if not tokenizer.renders_tools:
        _refuse_tools(request)
    if request.tool_choice == "none":
        tools = []  # what the model doesn't know of it can't call
    return tokenizer.render_chat(
        messages,
        tools=tools or None,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
        template_kwargs=template_kwargs,
    )


def _refuse_tools(request: ChatCompletionRequest) -> None:
    used = ["tools"] if request.tools and request.tool_choice != "none" else []
    for i, message in enumerate(request.messages):
        if message.tool_calls:
            used.append(f"messages[{i}].tool_calls")
    if used:
        raise InvalidRequest(
            f"{used[0]}: this model's chat template has no tools.", used[0], "unsupported_parameter"
        )


def _thinking(
    token_ids: list[int], control: ControlTokens | None, continues_answer: bool
) -> Thinking:
    """What the prompt's end leaves open."""
    if control is None:
        return Thinking.OFF
    for token_id in reversed(token_ids):
        if token_id == control.channel_open:
            return Thinking.OPEN
        if token_id in (control.channel_close, control.turn_open):
            break
    may_think = control.think in token_ids and not continues_answer
    return Thinking.ON if may_think else Thinking.OFF


def _num_preamble_tokens(
    token_ids: list[int], tokenizer: Tokenizer, control: ControlTokens | None
) -> int:
    if control is None or token_ids.count(control.turn_open) < 2:
        return 0
    role = token_ids.index(control.turn_open) + 1
    if not tokenizer.decode(token_ids[role : role + len("system")]).startswith("system"):
        return 0
    return token_ids.index(control.turn_open, role)


async def _off_loop(inputs: Any, param: str, tokenize: Callable[[], T]) -> T:
    try:
        if _is_short(inputs):
            return tokenize()
        return await asyncio.to_thread(tokenize)
    except RecursionError as error:
        raise InvalidRequest(f"{param}: the values are nested too deeply.", param) from error
    except InvalidRequest as error:
        # The tokenizer can't know where the text came from.
        error.param = error.param or param
        raise


def _is_short(inputs: Any) -> bool:
    """Whether all that is in it comes to no more than `_MAX_CHARS_ON_LOOP`."""
    num_left, pending = _MAX_CHARS_ON_LOOP, [inputs]
    while pending and num_left >= 0:
        item = pending.pop()
        if isinstance(item, str):
            num_left -= len(item)
        elif isinstance(item, Mapping):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif isinstance(item, BaseModel):
            pending.extend(vars(item).values())
        else:
            num_left -= 1
    return num_left >= 0
