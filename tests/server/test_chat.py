"""Messages as the template gets them."""

from typing import Any

import pytest

from bezel.engine.errors import InvalidRequest
from bezel.server.chat import template_messages
from bezel.server.schemas import ChatMessage


def template(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return template_messages([ChatMessage(**message) for message in messages])


def call(call_id: str, arguments: Any = "{}", name: str = "add") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def called(*calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


def answer(call_id: str, content: Any = "4") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}),
        ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
        (
            {"role": "user", "content": "hi", "name": "Ada"},
            {"role": "user", "content": "hi", "name": "Ada"},
        ),
        ({"role": "developer", "content": "hi"}, {"role": "system", "content": "hi"}),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "a b"},
        ),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": None, "refusal": "No."},
            {"role": "assistant", "content": "No."},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "assistant", "content": "No."},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "b\n"},
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c\n\n"},
            {"role": "assistant", "content": "a", "reasoning_content": "c\n"},
        ),
    ],
    ids=[
        *("text", "empty text", "name", "developer", "parts", "nothing", "refusal"),
        *("refusal part", "reasoning", "reasoning_content"),
    ],
)
def test_template_messages(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert template(message) == [expected]


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
        template({"role": "user", "content": content})
    assert error.value.param == param


def test_nor_is_everything_of_the_assistants() -> None:
    with pytest.raises(InvalidRequest) as error:
        template({"role": "assistant", "content": 0})
    assert error.value.param == "messages[0].content"


def test_other_parts_are_named() -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(InvalidRequest, match=r"only parts of type 'text' .* not 'image_url'"):
        template({"role": "user", "content": [part]})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
    ],
)
def test_arguments_become_objects(arguments: Any, expected: dict[str, Any]) -> None:
    messages = template(USER, called(call("1", arguments), type="x"), answer("1"))
    assert messages[1] == called(call("1", expected), content="")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{", "isn't valid JSON"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ("[" * 100_000, "isn't valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "isn't valid JSON"),
        ("[1]", "must be a JSON object"),
        ('"{}"', "must be a JSON object"),
        ([1], "must be a JSON object"),
        (0, "must be a JSON object"),
    ],
    ids=["cut", "nan", "deep", "long", "list", "string", "no string", "number"],
)
def test_other_arguments_are_refused_by_place(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        template(USER, called(call("0"), call("1", arguments)), answer("0"), answer("1"))
    assert error.value.param == "messages[1].tool_calls[1].function.arguments"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"type": "custom"}, ".type"),
        ({"id": None}, ".id"),
        ({"id": ""}, ".id"),
        ({"function": None}, ".function"),
        ({"function": {"arguments": "{}"}}, ".function.name"),
        ({"function": {"name": "a b", "arguments": "{}"}}, ".function.name"),
        ({"function": {"name": "<|turn>"}}, ".function.name"),
        ({"function": {"name": "add\n"}}, ".function.name"),
        ({"function": {"name": "a" * 65}}, ".function.name"),
    ],
)
def test_calls_are_functions_with_an_id_and_a_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        template(USER, called({**call("1"), **changes}), answer("1"))
    assert error.value.param == f"messages[1].tool_calls[0]{param}"


def test_answers_stand_in_the_order_of_the_calls() -> None:
    calls = [call("a", name="add"), call("b", name="mul")]
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    assert template(USER, called(*calls), answer("b", parts), answer("a", ""), USER)[2:] == [
        {"role": "tool", "tool_call_id": "a", "name": "add", "content": ""},
        {"role": "tool", "tool_call_id": "b", "name": "mul", "content": "12"},
        USER,
    ]


def test_ids_count_within_their_turn() -> None:
    turn = [called(call("1")), answer("1")]
    assert [m["role"] for m in template(USER, *turn, *turn)] == [
        *("user", "assistant", "tool", "assistant", "tool"),
    ]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([answer("1")], "messages[1].tool_call_id", "'1' is no call"),
        ([called(call("1")), answer("2")], "messages[2].tool_call_id", "'2' is no call"),
        (
            [called(call("1")), {"role": "tool", "content": "4"}],
            "messages[2].tool_call_id",
            "must name the call",
        ),
        (
            [called(call("1")), answer("1"), answer("1")],
            "messages[3].tool_call_id",
            "answered already",
        ),
        (
            [called(call("1")), answer("1"), USER, answer("1")],
            "messages[4].tool_call_id",
            "'1' is no call",
        ),
        ([called(call("1"))], "messages[1].tool_calls[0].id", "answers '1'"),
        ([called(call("1")), USER], "messages[1].tool_calls[0].id", "answers '1'"),
        (
            [called(call("1"), call("2")), answer("1"), {"role": "assistant", "content": "x"}],
            "messages[1].tool_calls[1].id",
            "answers '2'",
        ),
        ([called(call("1"), call("1"))], "messages[1].tool_calls[1].id", "another call's"),
        ([called(call("1")), answer("1", None)], "messages[2].content", "must be a string"),
    ],
)
def test_calls_and_answers_belong_together(
    messages: list[dict[str, Any]], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        template(USER, *messages)
    assert error.value.param == param


def test_what_is_said_in_a_row_is_one_message() -> None:
    messages = template(
        USER,
        {"role": "assistant", "content": "Let me ", "reasoning": "a"},
        {"role": "assistant", "content": "see.", "reasoning": "b"},
        called(call("1")),
        called(call("2")),
        answer("2"),
        answer("1"),
        {"role": "assistant", "content": "4 "},
        {"role": "assistant", "content": " is it "},
    )
    assert messages[-1]["content"] == "4is it "
    assert [message["role"] for message in messages[2:]] == ["tool", "tool", "assistant"]
    calls = [call("1", {}), call("2", {})]
    assert messages[1] == called(*calls, content="Let mesee.", reasoning_content="a\nb")
