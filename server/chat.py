"""Chat messages → what the chat template reads. The template itself is the tokenizer's matter."""

from collections.abc import Sequence
from typing import Any

from bezel.engine.errors import InvalidRequest
from bezel.server.schemas import ChatMessage


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Flatten contents to text.

    Raises:
        InvalidRequest: a content part isn't text, or a message says nothing.
    """
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: ChatMessage, path: str) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    # `developer` is OpenAI's newer name of the same role; Gemma's templates know only one.
    plain["role"] = "system" if message.role == "developer" else message.role
    if message.content is None and message.role == "assistant":
        plain["content"] = ""
    else:
        plain["content"] = _text(message.content, f"{path}.content")
    return plain


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{path} must be a string or a list of parts.", path)
    return "".join(_part_text(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise InvalidRequest(
            f"{path}: only parts of type 'text' are supported yet, not {kind!r:.100}.", path
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{path}.text must be a string.", f"{path}.text")
    return text
