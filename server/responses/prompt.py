"""Requests of the Responses API, told as chat completions.

instructions                    → message of the system, first
reasoning, message, function_call … of the assistant, in a row
                                → one message with reasoning_content, content, tool_calls
function_call_output            → a tool's message
"""

from typing import Any

from bezel.engine.errors import InvalidRequest
from bezel.server.chat_request import as_chat_request
from bezel.server.responses.schemas import (
    CallItem,
    CallOutputItem,
    InputItem,
    MessageItem,
    Part,
    ReasoningItem,
    ResponsesRequest,
)
from bezel.server.schemas import ChatCompletionRequest

Json = dict[str, Any]

# What can't be had, and why; false and null ask for nothing.
REFUSED = {
    **dict.fromkeys(
        ("previous_response_id", "conversation", "prompt", "background"),
        "nothing is stored between requests",
    ),
    "max_tool_calls": "the server calls no tools itself",
    "n": "a response is one answer",
    "top_logprobs": "chat completions have them",
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "it is called max_output_tokens here"),
}
_UNSUPPORTED = "unsupported_parameter"
_HARMLESS_INCLUDES = frozenset({"reasoning.encrypted_content"})
_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})


def chat_request(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request as a chat completion.

    Raises:
        InvalidRequest: something is asked for that isn't there.
    """
    extra = dict(body.model_extra or {})
    _check_extra(extra)
    _check_includes(body.include or [])
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages += _messages(body.input)
    fields: Json = {
        **extra,
        "model": body.model,
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls,
        "stream": body.stream,
        "truncate_prompt_tokens": _truncation(body.truncation),
    }
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.tools:
        fields["tools"] = [_function(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    fields["tool_choice"] = _tool_choice(body.tool_choice)
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    return as_chat_request(fields)


def _check_extra(extra: Json) -> None:
    for name, reason in REFUSED.items():
        value = extra.pop(name, None)
        if value and (name, value) != ("n", 1):
            raise InvalidRequest(f"{name} isn't supported: {reason}.", name, _UNSUPPORTED)


def _check_includes(names: list[str]) -> None:
    for name in names:
        if name not in _HARMLESS_INCLUDES:
            raise InvalidRequest(
                f"include: {name!r:.100} isn't supported.", "include", _UNSUPPORTED
            )


def _truncation(mode: str | None) -> int | None:
    """Dropping the beginning of a prompt that is too long is what "auto" asks for."""
    if mode not in (None, "disabled", "auto"):
        raise InvalidRequest("truncation must be 'auto' or 'disabled'.", "truncation")
    return -1 if mode == "auto" else None


def _messages(items: str | list[InputItem]) -> list[Json]:
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Json] = []
    for i, item in enumerate(items):
        path = f"input[{i}]"
        if isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": _text(item.content, path)})
        elif isinstance(item, CallOutputItem):
            text = _text(item.output, path)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
        else:
            _add_to_assistant(messages, item, path)
    return messages


def _add_to_assistant(messages: list[Json], item: InputItem, path: str) -> None:
    """Put what the model said into its message under way, or begin one."""
    if isinstance(item, MessageItem):
        _assistant(messages, before_text=True)["content"] = _text(item.content, path)
    elif isinstance(item, ReasoningItem):
        last = _assistant(messages, before_text=True)
        thought = _text(item.content or item.summary or [], path)
        last["reasoning_content"] = last.get("reasoning_content", "") + thought
    elif isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        _assistant(messages).setdefault("tool_calls", []).append(call)
    else:
        raise InvalidRequest(
            f"{path}: items of type {item.type!r:.100} aren't supported.",
            path,
            _UNSUPPORTED,
        )


def _assistant(messages: list[Json], before_text: bool = False) -> Json:
    """The assistant's message at the end, a new one if there is none; `before_text`: or if it has
    text or calls already, since a message has its thought and its text in front."""
    last = messages[-1] if messages else {"role": "nobody"}
    is_past = before_text and bool(last.get("content") or last.get("tool_calls"))
    if last["role"] != "assistant" or is_past:
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: str | list[Part], path: str) -> str:
    return content if isinstance(content, str) else "".join(_part(p, path) for p in content)


def _part(part: Part, path: str) -> str:
    if part.type == "refusal":
        return part.refusal or ""
    if part.type not in _TEXT_PARTS or part.text is None:
        raise InvalidRequest(
            f"{path}: only parts of text are supported yet, not {part.type!r:.100}.", path
        )
    return part.text


def _function(tool: Json, path: str) -> Json:
    """Functions stand flat here and nested there."""
    if tool.get("type") != "function":
        raise InvalidRequest(
            f"{path}: only tools of type 'function' are supported, not {tool.get('type')!r:.100}.",
            f"{path}.type",
            _UNSUPPORTED,
        )
    named = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": named}


def _tool_choice(choice: str | Json | None) -> str | Json | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise InvalidRequest(
            "tool_choice must be 'auto', 'none', 'required' or name a function.",
            "tool_choice",
            _UNSUPPORTED,
        )
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(form: Json) -> Json:
    if form.get("type") != "json_schema":
        return form
    return {
        "type": "json_schema",
        "json_schema": {key: value for key, value in form.items() if key != "type"},
    }
