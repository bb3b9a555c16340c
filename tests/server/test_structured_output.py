"""From a request's fields to the grammar of the whole output."""

import json
import re
from typing import Any

import pytest
from grammar_bytes import CONTROL, accepts, flaw

from bezel.engine.errors import InvalidRequest
from bezel.server.chat import Thinking
from bezel.server.grammars.structured_output import constrained_field, output_grammar
from bezel.server.schemas import ChatCompletionRequest, CompletionRequest

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = "<|tool_call>call:f{}<tool_call|>"


def request(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "?"}]
    return ChatCompletionRequest(model="m", messages=messages, **fields)


def grammar_of(thinking: Thinking = Thinking.OFF, **fields: Any) -> str:
    grammar = output_grammar(request(**fields), CONTROL, thinking)
    assert grammar is not None
    return grammar


def test_without_a_constraint_there_is_no_grammar() -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}):
        assert output_grammar(request(**fields), CONTROL, Thinking.ON) is None
    assert output_grammar(request(structured_outputs={"json": None}), None, Thinking.OFF) is None
    assert output_grammar(request(tools=[TOOL]), CONTROL, Thinking.ON) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"response_format": {"type": "json_schema", "schema": PERSON}},
        {"response_format": {"type": "json_object", "schema": PERSON}},
        {"structured_outputs": {"json": PERSON}},
        {"structured_outputs": {"json": json.dumps(PERSON), "regex": None}},
        {"guided_json": PERSON},
        {"guided_json": json.dumps(PERSON)},
        {"json_schema": PERSON},
    ],
)
def test_all_ways_of_asking_for_a_schema_are_the_same(fields: dict[str, Any]) -> None:
    grammar = grammar_of(**fields)
    assert grammar == grammar_of(response_format=FORMAT)
    assert accepts(grammar, '{"name":"Bob","age":3}') and not accepts(grammar, '{"age":3}')


def test_json_has_single_spaces_at_most() -> None:
    grammar = grammar_of(response_format=FORMAT)
    for text in ('{"name":"Bob","age":3}', '{"name": "Bob", "age": 3}', '{"name": "Bob"}'):
        assert accepts(grammar, text)
    for text in ('{ "name":"Bob"}', '{"name":  "Bob"}', '{"name":"Bob"} ', '\n{"name":"Bob"}'):
        assert not accepts(grammar, text)


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"json_object": True}},
])  # fmt: skip
def test_a_json_object_is_any_object(fields: dict[str, Any]) -> None:
    grammar = grammar_of(**fields)
    for text in ("{}", '{"a": [1, {"b": null}], "c":"x\\n"}'):
        assert accepts(grammar, text)
    for text in ("[]", "3", "", '{"a":1', "{'a':1}"):
        assert not accepts(grammar, text)


def test_a_property_has_one_spelling() -> None:
    """`\\u0061` would be a second one of `a`, whose schema wouldn't be asked."""
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    grammar = grammar_of(guided_json={"type": "object", **schema})
    assert accepts(grammar, '{"b":"x"}')
    assert not accepts(grammar, '{"\\u0061":"x"}') and not accepts(grammar, '{"a":"x"}')


def test_boolean_schemas() -> None:
    assert accepts(grammar_of(guided_json=True), '[1, "x"]')
    assert flaw(grammar_of(guided_json=False))


@pytest.mark.parametrize("field", ["guided_regex", "regex"])
def test_a_regex_matches_the_whole_output(field: str) -> None:
    grammar = grammar_of(**{field: r"^\d{2}/[a-z]+(\n)?$"})
    assert accepts(grammar, "12/ab") and accepts(grammar, "12/ab\n")
    for text in ("12/", "x12/ab", "1/ab", "٣٣/ab"):
        assert not accepts(grammar, text)


def test_a_choice_is_literal() -> None:
    choices = ["yes", 'no "no"', "a|b", "line\nend", "ü🦄", "[0-9]+", "<|turn> "]
    grammar = grammar_of(structured_outputs={"choice": choices})
    for text in choices[:-1]:
        assert accepts(grammar, text)
    for text in ("yesno", "a", "5", "", "ye"):
        assert not accepts(grammar, text)
    many = grammar_of(guided_choice=[f"choice {i}" for i in range(3000)])
    assert accepts(many, "choice 2999") and not accepts(many, "choice 3000")


@pytest.mark.parametrize("field", ["guided_grammar", "grammar"])
@pytest.mark.parametrize(
    "source",
    [
        'start: expr\nexpr: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/',
        'root ::= expr\nexpr ::= number ("+" number)*\nnumber ::= [0-9]+',
        '# a rule named so\nroot ::= start\nstart ::= [0-9]+ ("+" [0-9]+)*',
    ],
)
@pytest.mark.parametrize("thinking", list(Thinking))
def test_grammars_in_lark_and_gbnf(field: str, source: str, thinking: Thinking) -> None:
    if "named so" in source:
        source = source.replace("start", "begin")
    thought = "hm<channel|>" if thinking is Thinking.OPEN else ""
    grammar = grammar_of(thinking, **{field: source})
    assert accepts(grammar, thought + "1+23") and not accepts(grammar, thought + "1+")


@pytest.mark.parametrize("fields", [
    {"response_format": FORMAT}, {"guided_choice": ["x"]}, {"guided_regex": "a"},
    {"grammar": 'start: "a"'},
])  # fmt: skip
def test_a_thought_comes_first(fields: dict[str, Any]) -> None:
    body = next(t for t in ('{"name":"x"}', "x", "a") if accepts(grammar_of(**fields), t))
    thought = '<|channel>thought\n{"name":\n🦄<channel|>'
    rest = thought.removeprefix("<|channel>")
    accepted = {
        thinking: [text for text in (body, thought + body, rest + body) if accepts(grammar, text)]
        for thinking in Thinking
        for grammar in [grammar_of(thinking, **fields)]
    }
    assert accepted == {
        Thinking.OFF: [body],
        Thinking.ON: [body, thought + body],
        Thinking.OPEN: [rest + body],
    }


def test_thoughts_hold_no_control_tokens() -> None:
    grammar = grammar_of(Thinking.ON, guided_choice=["x"])
    for inside in ("<|channel>", "<turn|>", "<|tool_call>", '<|"|>'):
        assert not accepts(grammar, f"<|channel>a{inside}b<channel|>x")


def test_a_model_without_control_tokens_just_answers() -> None:
    grammar = output_grammar(request(guided_choice=["x"], tools=[TOOL]), None, Thinking.ON)
    assert grammar is not None and accepts(grammar, "x") and "<[" not in grammar


def test_completions_have_no_thoughts_and_no_calls() -> None:
    completion = CompletionRequest(model="m", prompt="?", guided_choice=["x"])
    grammar = output_grammar(completion, None, Thinking.OFF)
    assert grammar is not None and accepts(grammar, "x")


def test_a_format_and_tools_are_an_answer_or_calls() -> None:
    grammar = grammar_of(Thinking.ON, response_format=FORMAT, tools=[TOOL])
    for text in ('{"name":"x"}', CALL, CALL + CALL, "<|channel>y<channel|>" + CALL):
        assert accepts(grammar, text)
    for text in ("", "text", '{"name":"x"}' + CALL, "x" + CALL):
        assert not accepts(grammar, text)


def test_where_a_call_is_required_a_format_has_nothing_to_say() -> None:
    grammar = grammar_of(response_format=FORMAT, tools=[TOOL], tool_choice="required")
    assert accepts(grammar, CALL) and not accepts(grammar, '{"name":"x"}')
    with pytest.raises(InvalidRequest) as caught:
        grammar_of(guided_regex="a", tools=[TOOL], tool_choice="required")
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"guided_json": PERSON, "grammar": 'start: "a"'}, "grammar"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": 3}}, "response_format"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 3]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": {}}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " *"}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": "root ::= " + "(" * 5000}, "grammar"),
        ({"grammar": "root ::= " + '"a" ' * 5000}, "grammar"),
        ({"grammar": "start: " + '"a" ' * 60_000}, "grammar"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammar_of(**fields)
    assert caught.value.param == param and re.match(re.escape(param), caught.value.message)


def test_the_field_that_a_grammar_comes_from() -> None:
    assert constrained_field(request(guided_regex="a")) == "guided_regex"
    assert constrained_field(request(structured_outputs={"choice": ["a"]})) == (
        "structured_outputs.choice"
    )
    assert constrained_field(request(tools=[TOOL], tool_choice="required")) == "tools"
