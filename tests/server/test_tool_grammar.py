"""Which calls the grammar of a request's tools matches."""

from typing import Any

import pytest
from grammar_bytes import CONTROL, accepts

from bezel.engine.errors import InvalidRequest
from bezel.server.grammars.tool_grammar import ToolGrammar, tool_grammar
from bezel.server.schemas import ChatCompletionRequest

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PARIS = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'
NOW = "<|tool_call>call:now{}<tool_call|>"


def function(name: str, parameters: Any = None, strict: bool | None = None) -> dict[str, Any]:
    described = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": described}


WEATHER, CLOCK = function("weather", CITY, strict=True), function("now")


def grammar_of(
    *tools: dict[str, Any], has_format: bool = False, **fields: Any
) -> ToolGrammar | None:
    request = ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "?"}], tools=list(tools), **fields
    )
    return tool_grammar(request, CONTROL, has_format=has_format)


def lark(*tools: dict[str, Any], **fields: Any) -> str:
    grammar = grammar_of(*tools, **fields)
    assert grammar is not None
    return "\n".join([f"start: {grammar.start}", "TEXT: /(?s:.*)/", *grammar.rules])


def test_required_is_one_call_or_more_and_no_text() -> None:
    grammar = lark(WEATHER, CLOCK, tool_choice="required")
    for text in (PARIS, NOW, NOW + PARIS, PARIS * 3):
        assert accepts(grammar, text)
    for text in ("", "Hello", "Hello" + PARIS, PARIS + "Hello", PARIS[:-13]):
        assert not accepts(grammar, text)


def test_a_named_function_is_called_once() -> None:
    grammar = lark(WEATHER, CLOCK, tool_choice={"type": "function", "function": {"name": "now"}})
    assert accepts(grammar, NOW)
    for text in ("", PARIS, NOW + NOW):
        assert not accepts(grammar, text)


def test_auto_with_a_strict_function_is_text_and_calls_that_fit() -> None:
    grammar = lark(WEATHER, CLOCK)
    for text in ("", "Hello <b>", PARIS, "Let me see." + PARIS + NOW):
        assert accepts(grammar, text)
    for text in (PARIS + "Hello", "<|tool_call>call:weather{}<tool_call|>", "<|channel>x"):
        assert not accepts(grammar, text)


def test_without_parallel_calls_there_is_one_at_most() -> None:
    once = {"parallel_tool_calls": False}
    assert accepts(lark(WEATHER, CLOCK, **once), "Hi" + PARIS)
    assert not accepts(lark(WEATHER, CLOCK, **once), PARIS + NOW)
    assert accepts(lark(CLOCK, **once), "Hi")
    forced = lark(WEATHER, CLOCK, tool_choice="required", **once)
    assert accepts(forced, PARIS) and not accepts(forced, PARIS + NOW)


def test_a_format_is_for_answers_so_calls_come_without_text() -> None:
    grammar = lark(CLOCK, has_format=True)
    assert accepts(grammar, NOW)
    assert not accepts(grammar, "") and not accepts(grammar, "Hi" + NOW)


def test_nothing_is_constrained_where_nothing_is_promised() -> None:
    assert grammar_of() is None
    assert grammar_of(CLOCK) is None
    assert grammar_of(WEATHER, tool_choice="none") is None
    assert grammar_of(CLOCK, tool_choice="auto", parallel_tool_calls=True) is None


def test_functions_without_strict_are_called_as_their_schemas_say_where_that_can_be_said() -> None:
    odd = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "s": {"type": "string", "not": {}}},
        "required": ["n"],
    }
    grammar = lark(function("f", odd), tool_choice="required")
    assert accepts(grammar, '<|tool_call>call:f{s:<|"|>x<|"|>,n:1}<tool_call|>')
    assert not accepts(grammar, '<|tool_call>call:f{n:<|"|>x<|"|>}<tool_call|>')
    with pytest.raises(InvalidRequest, match=r"at #/properties/s/not") as caught:
        lark(function("f", odd, strict=True), tool_choice="required")
    assert caught.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize("broken", [{"type": "strnig"}, {"type": "string"}, 3, {"$ref": "#/a"}])
def test_parameters_that_make_no_sense_are_any_arguments(broken: Any) -> None:
    grammar = lark(function("f", broken), tool_choice="required")
    assert accepts(grammar, '<|tool_call>call:f{a:1,b:[{c:<|"|>}<|"|>}]}<tool_call|>')
    with pytest.raises(InvalidRequest):
        lark(function("f", broken, strict=True), tool_choice="required")


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([WEATHER], {"type": "function", "function": {"name": "x"}}, "tool_choice"),
        ([{"type": "function"}], "required", "tools[0].function"),
        ([function('f{}<|"|>')], "required", "tools[0].function.name"),
        ([WEATHER, function("")], "required", "tools[1].function.name"),
    ],
)
def test_mistakes_are_named(tools: list[Any], choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammar_of(*tools, tool_choice=choice)
    assert caught.value.param == param
