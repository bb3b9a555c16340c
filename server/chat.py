"""Chat messages → what the chat template reads. The template itself is the tokenizer's matter.

Clients' ways of saying a thing become one, so that a template has only that to get right:

- contents are text, arguments are objects, `developer` is `system`;
- what the model says without anyone else between is one message;
- answers of tools stand in the order of the calls, under the names of the functions.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

from bezel.engine.errors import InvalidRequest
from bezel.server.schemas import ChatMessage
from bezel.server.tools import check_name


class Thinking(StrEnum):
    """Whether the answer may begin with a thought.

    OPEN: the prompt ends within one.
    """

    OFF = "off"
    ON = "on"
    OPEN = "open"


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Check messages and bring them into the one form that templates get.

    Raises:
        InvalidRequest: a content part isn't text, a message says nothing, or calls of tools and
            their answers don't belong together.
    """
    conversation = _Conversation()
    for i, message in enumerate(messages):
        conversation.add(message, f"messages[{i}]")
    return conversation.finish()


@dataclass(slots=True)
class _Call:
    """A call of the model's last message, and what the tool answered."""

    name: str
    path: str
    answer: str | None = None


@dataclass(slots=True)
class _Conversation:
    """Messages as they come; answers of tools are kept until all are there."""

    plain: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[str, _Call] = field(default_factory=dict)

    def add(self, message: ChatMessage, path: str) -> None:
        if message.role == "tool":
            self._answer(message, path)
        elif message.role == "assistant":
            if any(call.answer is not None for call in self.calls.values()):
                self._end_calls()
            self._say(message, path)
        else:
            self._end_calls()
            # `developer` is OpenAI's newer name of the same role; Gemma's templates know only one.
            role = "system" if message.role == "developer" else message.role
            plain = {"role": role, "content": _text(message.content, f"{path}.content")}
            self.plain.append(plain | ({"name": message.name} if message.name else {}))

    def finish(self) -> list[dict[str, Any]]:
        self._end_calls()
        return self.plain

    def _say(self, message: ChatMessage, path: str) -> None:
        """The model's words and calls; those of two messages in a row are one."""
        said = _assistant_message(message, path)
        for j, call in enumerate(said.get("tool_calls", ())):
            call_path = f"{path}.tool_calls[{j}]"
            if call["id"] in self.calls:
                raise InvalidRequest(f"{call_path}.id is another call's.", f"{call_path}.id")
            self.calls[call["id"]] = _Call(call["function"]["name"], call_path)
        if self.plain and self.plain[-1]["role"] == "assistant":
            said = _joined(self.plain.pop(), said)
        self.plain.append(said)

    def _answer(self, message: ChatMessage, path: str) -> None:
        call = self.calls.get(message.tool_call_id or "")
        if call is None or call.answer is not None:
            self._refuse_answer(message, f"{path}.tool_call_id")
        call.answer = _text(message.content, f"{path}.content")

    def _refuse_answer(self, message: ChatMessage, path: str) -> NoReturn:
        if message.tool_call_id is None:
            problem = "must name the call that is answered"
        elif message.tool_call_id in self.calls:
            problem = "has been answered already"
        else:
            problem = f"{message.tool_call_id!r:.100} is no call of the assistant's message before"
        raise InvalidRequest(f"{path} {problem}.", path)

    def _end_calls(self) -> None:
        for call_id, call in self.calls.items():
            if call.answer is None:
                path = f"{call.path}.id"
                raise InvalidRequest(
                    f"{path}: no message of role 'tool' answers {call_id!r:.100}.", path
                )
            self.plain.append(
                {
                    "role": "tool",
                    "tool_call_id": call_id,
                    "name": call.name,
                    "content": call.answer,
                }
            )
        self.calls = {}


def _assistant_message(message: ChatMessage, path: str) -> dict[str, Any]:
    content = message.refusal if message.content is None else message.content
    text = "" if content is None else _text(content, f"{path}.content")
    plain: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning := message.reasoning_content or message.reasoning:
        # Templates end a thought with a line break of their own.
        plain["reasoning_content"] = reasoning.removesuffix("\n")
    if message.tool_calls:
        plain["tool_calls"] = [
            _call(call, f"{path}.tool_calls[{j}]") for j, call in enumerate(message.tool_calls)
        ]
    return plain


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two messages in a row, as the newest template joins them."""
    text = first["content"].rstrip() + second["content"].lstrip()
    joined = {**first, **second, "content": text}
    thoughts = [m["reasoning_content"] for m in (first, second) if "reasoning_content" in m]
    if thoughts:
        joined["reasoning_content"] = "\n".join(thoughts)
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


def _call(call: dict[str, Any], path: str) -> dict[str, Any]:
    if call.get("type", "function") != "function":
        raise InvalidRequest(f"{path}.type must be 'function'.", f"{path}.type")
    if not isinstance(call.get("id"), str) or not call["id"]:
        raise InvalidRequest(f"{path}.id must be a string.", f"{path}.id")
    function, path = call.get("function"), f"{path}.function"
    if not isinstance(function, dict):
        raise InvalidRequest(f"{path} must be an object.", path)
    name = check_name(function.get("name"), f"{path}.name")
    arguments = _arguments(function.get("arguments"), f"{path}.arguments")
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments(arguments: Any, path: str) -> dict[str, Any]:
    """A JSON object, spelled out as clients send it or not."""
    if arguments in (None, ""):
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{path} isn't valid JSON: {error}.", path) from error
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{path} must be a JSON object.", path)
    return arguments


def _refuse_constant(name: str) -> NoReturn:
    """Python reads NaN and infinities, which JSON doesn't have."""
    raise ValueError(f"{name} is no JSON value")


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{path} must be a string or a list of parts.", path)
    return "".join(_part_text(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise InvalidRequest(
            f"{path}: only parts of type 'text' are supported yet, not {kind!r:.100}.", path
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(f"{path}.{kind} must be a string.", f"{path}.{kind}")
    return text
