"""Declarations of tools: what is shown of them, and what is refused."""

from typing import Any

import pytest

from bezel.engine.errors import InvalidRequest
from bezel.server.tools import check_tool_choice, template_tools


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        ({}, {"description": ""}),
        ({"description": None, "parameters": None, "strict": True}, {"description": ""}),
        ({"description": "Adds.", "parameters": {}}, {"description": "Adds."}),
        (
            {"parameters": {"type": "object", "$schema": "x"}},
            {"description": "", "parameters": {"type": "object", "properties": {}}},
        ),
        (
            {"parameters": {"properties": {"a": {"type": "string"}}, "required": ["a"]}},
            {
                "description": "",
                "parameters": {
                    "type": "object",
                    "properties": {"a": {"type": "string"}},
                    "required": ["a"],
                },
            },
        ),
    ],
)
def test_template_tools(function: dict[str, Any], shown: dict[str, Any]) -> None:
    assert template_tools([tool(**function)]) == [tool(**shown)]


@pytest.mark.parametrize(
    ("declared", "param"),
    [
        ("f", "tools[1].type"),
        ({"type": "custom"}, "tools[1].type"),
        ({"type": "function"}, "tools[1].function"),
        ({"type": "function", "function": {}}, "tools[1].function.name"),
        (tool(name="a.b"), "tools[1].function.name"),
        (tool(name="<|turn>"), "tools[1].function.name"),
        (tool(name=""), "tools[1].function.name"),
        (tool(description=1), "tools[1].function.description"),
        (tool(parameters=[1]), "tools[1].function.parameters"),
        (tool(parameters=[]), "tools[1].function.parameters"),
        (tool(parameters=True), "tools[1].function.parameters"),
        (tool(name="g"), "tools[1].function.name"),
    ],
)
def test_what_is_no_tool_is_refused_by_place(declared: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        template_tools([tool(name="g"), declared])
    assert error.value.param == param


NAMED = {"type": "function", "function": {"name": "f"}}


def test_tool_choice() -> None:
    for choice in (None, "none", "auto"):
        check_tool_choice(choice, [])
    for choice in ("required", NAMED):
        check_tool_choice(choice, [tool()])


@pytest.mark.parametrize(
    ("choice", "tools", "param"),
    [
        ("any", [tool()], "tool_choice"),
        ({"type": "allowed_tools"}, [tool()], "tool_choice"),
        ("required", [], "tool_choice"),
        (NAMED, [], "tool_choice"),
        (NAMED, [tool(name="g")], "tool_choice.function.name"),
        ({"type": "function", "function": "f"}, [tool()], "tool_choice.function.name"),
    ],
)
def test_choices_that_are_none(choice: Any, tools: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_tool_choice(choice, tools)
    assert error.value.param == param
