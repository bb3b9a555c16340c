"""Messages as the template gets them."""

from typing import Any

import pytest

from bezel.engine.errors import InvalidRequest
from bezel.server.chat import template_messages
from bezel.server.schemas import ChatMessage


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}),
        ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
        ({"role": "developer", "content": "hi"}, {"role": "system", "content": "hi"}),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "ab"},
        ),
        (
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "1"}]},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
        ),
        (
            {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"},
            {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"},
        ),
    ],
    ids=["text", "empty text", "developer", "parts", "assistant without text", "tool"],
)
def test_template_messages(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert template_messages([ChatMessage(**message)]) == [expected]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (None, "messages[0].content"),
        (1, "messages[0].content"),
        ({"type": "text", "text": "x"}, "messages[0].content"),
        (["x"], "messages[0].content[0]"),
        ([{"type": "text", "text": "x"}, {"type": "input_audio"}], "messages[0].content[1]"),
        ([{"type": "text"}], "messages[0].content[0].text"),
    ],
    ids=str,
)
def test_contents_that_are_no_text(content: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        template_messages([ChatMessage(role="user", content=content)])
    assert error.value.param == param


def test_other_parts_are_named() -> None:
    message = ChatMessage(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}])
    with pytest.raises(InvalidRequest, match=r"only parts of type 'text' .* not 'image_url'"):
        template_messages([message])
