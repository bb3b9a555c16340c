"""Tools as requests declare them → declarations as the chat template reads them."""

import re
from collections.abc import Sequence
from typing import Any

from bezel.engine.errors import InvalidRequest
from bezel.server.tool_schema import SchemaReader

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")


def template_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Check declarations and reduce them to what templates show.

    Raises:
        InvalidRequest: a tool isn't a function, has no proper name or the name of another, or its
            parameters aren't a JSON schema.
    """
    reader = SchemaReader()
    declared = [_declaration(tool, f"tools[{i}]", reader) for i, tool in enumerate(tools)]
    names: set[str] = set()
    for i, tool in enumerate(declared):
        name = tool["function"]["name"]
        if name in names:
            path = f"tools[{i}].function.name"
            raise InvalidRequest(f"{path}: there are two tools named {name!r}.", path)
        names.add(name)
    return declared


def check_name(name: Any, path: str) -> str:
    """A function's name.

    Raises:
        InvalidRequest: OpenAI wouldn't take it.
    """
    if isinstance(name, str) and _NAME.match(name):
        return name
    raise InvalidRequest(
        f"{path} must be 1 to 64 letters, digits, underscores or dashes, not {name!r:.100}.", path
    )


def check_tool_choice(choice: Any, tools: Sequence[dict[str, Any]]) -> None:
    """`tools` are the declared ones, as `template_tools` gives them.

    Raises:
        InvalidRequest: the choice isn't one, or isn't among the tools.
    """
    if choice in (None, "none", "auto"):
        return
    named = isinstance(choice, dict) and choice.get("type") == "function"
    if choice != "required" and not named:
        raise InvalidRequest(
            "tool_choice must be 'none', 'auto', 'required' or a function: "
            '{"type": "function", "function": {"name": …}}.',
            "tool_choice",
        )
    if not tools:
        raise InvalidRequest("tool_choice goes only with tools.", "tool_choice")
    if named:
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if all(name != tool["function"]["name"] for tool in tools):
            raise InvalidRequest(
                f"tool_choice: there is no tool named {name!r:.100}.", "tool_choice.function.name"
            )


def _declaration(tool: Any, path: str, reader: SchemaReader) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise InvalidRequest(f"{path}.type must be 'function', not {kind!r:.100}.", f"{path}.type")
    function, path = tool.get("function"), f"{path}.function"
    if not isinstance(function, dict):
        raise InvalidRequest(f"{path} must be an object.", path)
    declared = {"name": check_name(function.get("name"), f"{path}.name"), "description": ""}
    description = function.get("description")
    if description is not None:
        if not isinstance(description, str):
            raise InvalidRequest(f"{path}.description must be a string.", f"{path}.description")
        declared["description"] = description
    parameters = function.get("parameters")
    # No parameters at all, in either way of saying so.
    if parameters:
        return _function(declared | {"parameters": reader.read(parameters, f"{path}.parameters")})
    if parameters not in (None, {}):
        raise InvalidRequest(f"{path}.parameters must be a JSON schema.", f"{path}.parameters")
    return _function(declared)


def _function(declared: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": declared}
