"""Requests of Anthropic's Messages API, told as chat completions.

One pipeline serves all routes: what is left here is naming the same things differently.

    system                          → message of the system
    user: tool_result …, text …     → a tool's message for each result, then the user's
    assistant: thinking, text, tool_use → one message with reasoning_content, content, tool_calls
    last message the assistant's    → it is continued
"""

import json
from collections.abc import Iterable
from typing import Any

from bezel.engine.errors import InvalidRequest
from bezel.server.anthropic.schemas import (
    CountTokensRequest,
    Message,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from bezel.server.chat_request import as_chat_request
from bezel.server.schemas import ChatCompletionRequest

Json = dict[str, Any]

# Fields of chat completions that the answer has no place for.
_REFUSED = frozenset(
    {
        "n",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "return_token_ids",
        "stop",
        "stream_options",
    }
)


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """The same request as a chat completion.

    Raises:
        InvalidRequest: blocks stand where they can't.
    """
    messages = [{"role": "system", "content": _joined(body.system)}] if body.system else []
    for i, message in enumerate(body.messages):
        messages += _chat_messages(message, f"messages[{i}]")
    extra = body.model_extra or {}
    for name in _REFUSED & extra.keys():
        raise InvalidRequest(
            f"{name}: messages have no such thing; chat completions do.",
            name,
            "unsupported_parameter",
        )
    fields: Json = {**extra, "model": body.model, "messages": messages, **_thinking(body)}
    if body.messages[-1].role == "assistant":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        fields["tools"] = [_function(tool) for tool in body.tools]
    fields |= _tool_choice(body.tool_choice)
    if body.output_config and (form := body.output_config.format):
        schema = {"name": "output", "schema": form.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesRequest):
        fields |= _sampling(body)
    return as_chat_request(fields, _stop_strings(body))


def _stop_strings(body: CountTokensRequest) -> tuple[str, ...]:
    strings = body.stop_sequences or [] if isinstance(body, MessagesRequest) else []
    if "" in strings:
        raise InvalidRequest("stop_sequences must not be empty strings.", "stop_sequences")
    return tuple(strings)


def _sampling(body: MessagesRequest) -> Json:
    return {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stream": body.stream,
    }


def _thinking(body: CountTokensRequest) -> Json:
    thinking = body.thinking
    if thinking is None or thinking.type == "disabled":
        return {"chat_template_kwargs": {"enable_thinking": False}}
    fields: Json = {"chat_template_kwargs": {"enable_thinking": True}}
    if thinking.budget_tokens is not None:
        fields["thinking_token_budget"] = thinking.budget_tokens
    return fields


def _function(tool: Tool) -> Json:
    function: Json = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice | None) -> Json:
    if choice is None:
        return {}
    fields: Json = {}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if choice.type != "tool":
        return fields | {"tool_choice": "required" if choice.type == "any" else choice.type}
    if choice.name is None:
        raise InvalidRequest("tool_choice.name must say which tool.", "tool_choice.name")
    return fields | {"tool_choice": {"type": "function", "function": {"name": choice.name}}}


def _chat_messages(message: Message, path: str) -> list[Json]:
    if message.role == "user":
        return _user_messages(message, path)
    return [_assistant_message(message, path)]


def _user_messages(message: Message, path: str) -> list[Json]:
    results: list[Json] = []
    texts: list[str] = []
    for i, block in enumerate(message.content):
        if isinstance(block, ToolResultBlock):
            text = _joined(block.content or ())
            text = f"Error: {text}" if block.is_error else text
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
        elif isinstance(block, TextBlock):
            texts.append(block.text)
        else:
            raise _misplaced(block, f"{path}.content[{i}]", "assistant")
    user = [{"role": "user", "content": "".join(texts)}] if texts or not results else []
    return [*results, *user]


def _assistant_message(message: Message, path: str) -> Json:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for i, block in enumerate(message.content):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            arguments = json.dumps(block.input, ensure_ascii=False)
            function = {"name": block.name, "arguments": arguments}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            raise _misplaced(block, f"{path}.content[{i}]", "user")
    chat: Json = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        chat["reasoning_content"] = "".join(thoughts)
    if calls:
        chat["tool_calls"] = calls
    return chat


def _misplaced(block: Any, path: str, role: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: a block of type {block.type!r} is only the {role}'s.", path)


def _joined(blocks: Iterable[TextBlock]) -> str:
    return "".join(block.text for block in blocks)
