"""What has been said so far, and the answer that is being given, as chat completions have it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bezel.engine.errors import ConfigError
from bezel.server.chatting.display import Display
from bezel.server.chatting.settings import ChatSettings
from bezel.server.stream_chunks import choices_of

Json = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """One turn of the model, gathered from its chunks."""

    content: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: Json, display: Display) -> None:
        """Take what a chunk brings, and show it."""
        for choice in choices_of(chunk):
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            if thought:
                self.reasoning += thought
                display.thought(thought)
            if content := delta.get("content"):
                self.content += content
                display.content(content)
            for piece in delta.get("tool_calls") or ():
                self._add_call(piece, display)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _add_call(self, piece: Json, display: Display) -> None:
        function = piece.get("function") or {}
        name, arguments = function.get("name") or "", function.get("arguments") or ""
        if name or not self.calls:
            empty = {"name": name, "arguments": ""}
            self.calls.append({"id": piece.get("id"), "type": "function", "function": empty})
        self.calls[-1]["function"]["arguments"] += arguments
        display.call(name, arguments)

    def as_message(self) -> Json:
        """As later requests repeat it: a thought only beside calls, which go on with it."""
        message: Json = {"role": "assistant", "content": self.content}
        if self.calls:
            message |= {"tool_calls": self.calls}
            message |= {"reasoning_content": self.reasoning} if self.reasoning else {}
        return message


class Conversation:
    """The turns of a chat; `system` and `think` may be changed between them."""

    def __init__(self, settings: ChatSettings) -> None:
        self.system = settings.system
        self.think = settings.think
        self.messages: list[Json] = []
        self._sampling = settings.sampling
        self._tools = None if settings.tools is None else read_tools(settings.tools)

    def body(self) -> Json:
        """The request for the next answer, but for the model's name."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: Json = {"messages": [*system, *self.messages], **self._sampling}
        if self._tools is not None:
            body["tools"] = self._tools
        if self.think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.think}
        return body

    def ask(self, text: str) -> None:
        """The user's turn."""
        self.messages.append({"role": "user", "content": text})

    def answered(self, answer: Answer) -> None:
        """The model's turn, which is over."""
        self.messages.append(answer.as_message())

    def cut(self, answer: Answer) -> None:
        """The model's turn, which the user has ended: what was said remains."""
        if answer.content and not answer.calls:
            self.answered(answer)
        else:
            self.take_back()

    def returned(self, call: Json, result: str) -> None:
        """What a tool answered."""
        self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})

    def take_back(self) -> None:
        """Forget the user's last turn and all since: there is no answer to it."""
        while self.messages and self.messages.pop()["role"] != "user":
            pass

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.messages = []


def read_tools(path: str) -> list[Json]:
    """The tools of a file, as OpenAI declares them; the server looks at them more closely.

    Raises:
        ConfigError: it can't be read, or isn't a list of objects.
    """
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--tools {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--tools {path}: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"--tools {path}: not a list of objects")
    return tools
