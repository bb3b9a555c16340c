"""Calls of tools as a grammar, in the syntax that Gemma writes them in.

    required    start: call+
    auto        start: TEXT call*
                call: <[48]> (call_0 | call_1) <[49]>
                call_0: "call:get_weather" arguments

After the last call the output ends, with whatever token the model ends it. Arguments are what
`server.call_arguments` makes of the functions' parameters: all that a `strict` function's schema
says, and of the others' what can be said.
"""

from dataclasses import dataclass
from typing import Any

from bezel.engine.errors import InvalidRequest
from bezel.server.control_tokens import ControlTokens
from bezel.server.grammars.call_arguments import argument_rule
from bezel.server.grammars.call_syntax import CallSyntax
from bezel.server.schemas import ChatCompletionRequest
from bezel.server.tools import check_name


@dataclass(frozen=True, slots=True)
class ToolGrammar:
    """`start` matches all that is said and called; `rules` say what it means.

    `is_forced`: nothing but calls is matched. The rules refer to a terminal `TEXT`.
    """

    start: str
    rules: list[str]
    is_forced: bool


@dataclass(frozen=True, slots=True)
class _Function:
    name: str
    parameters: Any
    is_strict: bool
    param: str


def tool_grammar(
    request: ChatCompletionRequest, control: ControlTokens, *, has_format: bool
) -> ToolGrammar | None:
    """The grammar of calls, or None if they may be of any shape.

    `has_format`: an answer without a call is constrained by something else.

    Raises:
        InvalidRequest: a strict function's parameters can't be enforced, or the choice is none of
            the functions.
    """
    choice = "auto" if request.tool_choice is None else request.tool_choice
    if not request.tools or choice == "none":
        return None
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
    is_forced = choice != "auto"
    is_single = isinstance(choice, dict) or request.parallel_tool_calls is False
    if isinstance(choice, dict):
        functions = [f for f in functions if f.name == _chosen_name(choice)]
        if not functions:
            raise InvalidRequest("tool_choice names none of the tools.", "tool_choice")
    # Without calls at a time there is nothing to enforce in what a model may say freely.
    is_free = not is_forced and not has_format and not is_single
    if is_free and not any(function.is_strict for function in functions):
        return None
    rules = _rules(functions, control)
    if is_forced or has_format:
        return ToolGrammar("call" if is_single else "call+", rules, is_forced)
    return ToolGrammar("TEXT call?" if is_single else "TEXT call*", rules, is_forced)


def _rules(functions: list[_Function], control: ControlTokens) -> list[str]:
    syntax = CallSyntax(control.quote)
    calls = []
    for i, function in enumerate(functions):
        arguments = argument_rule(
            function.parameters, syntax, function.param, is_strict=function.is_strict
        )
        calls.append(f'call_{i}: "call:{function.name}" {arguments}')
    names = " | ".join(f"call_{i}" for i in range(len(functions)))
    call = f"call: <[{control.tool_call_open}]> ({names}) <[{control.tool_call_close}]>"
    return [call, *calls, *syntax.rules()]


def _function(tool: Any, path: str) -> _Function:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest(f"{path}.function must be an object.", f"{path}.function")
    path = f"{path}.function"
    name = check_name(function.get("name"), f"{path}.name")
    is_strict = function.get("strict") is True
    return _Function(name, function.get("parameters"), is_strict, f"{path}.parameters")


def _chosen_name(choice: dict[str, Any]) -> Any:
    function = choice.get("function")
    return function.get("name") if isinstance(function, dict) else None
