"""Parameters as JSON schemas, and the arguments in Gemma's syntax that fit them."""

from typing import Any

import pytest
from grammar_bytes import accepts

from bezel.engine.errors import InvalidRequest
from bezel.server.grammars.call_arguments import argument_rule
from bezel.server.grammars.call_syntax import CallSyntax

TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}


def grammar_of(parameters: Any, is_strict: bool = True) -> str:
    syntax = CallSyntax(52)
    rule = argument_rule(parameters, syntax, "parameters", is_strict=is_strict)
    return "\n".join([f"start: {rule}", "TEXT: /(?s:.*)/", *syntax.rules()])


def check(parameters: Any, good: str, bad: str) -> None:
    """Texts have ` ; ` between them; an apostrophe stands for the quote token."""
    grammar = grammar_of(parameters)
    for text in good.split(" ; "):
        assert accepts(grammar, text.replace("'", '<|"|>')), text
    for text in bad.split(" ; "):
        assert not accepts(grammar, text.replace("'", '<|"|>')), text


def test_properties_come_in_any_order_each_once_and_the_required_ones_must() -> None:
    schema = {
        "type": "object",
        "properties": {"a": WHOLE, "b": TEXT, "c": WHOLE},
        "required": ["b"],
    }
    check(
        schema,
        "{b:'x'} ; {a:1,b:''} ; {b:'x',c:2,a:1} ; {c:2,b:'x',a:1}",
        "{} ; {a:1} ; {b:'x',} ; {,b:'x'} ; {b:'x',b:'y'} ; {b:'x' ,a:1} ; {b:'x',d:1}",
    )


@pytest.mark.parametrize("nothing", [None, {}, {"type": "object", "properties": {}}])
def test_without_properties_there_are_no_arguments(nothing: Any) -> None:
    check(nothing, "{}", "{a:1} ; { }")


def test_an_open_object_has_any_names() -> None:
    check(
        {"type": "object"},
        "{} ; {a:1} ; {'any name: {}':[null,true,{b:'x'}],a-b.c:-1.5e3} ; {größe:[]}",
        '{a} ; {a:} ; {a:x} ; {a b:1} ; {a:1 } ; {a:"x"}',
    )


def test_other_properties_are_of_their_own_kind_and_no_second_ones() -> None:
    schema = {"type": "object", "properties": {"a": TEXT}, "additionalProperties": WHOLE}
    check(
        schema,
        "{} ; {b:1,a:'x'} ; {a:'x',aa:1,'b c':2}",
        "{a:1} ; {'a':1} ; {b:'x'} ; {a:'x',a:1} ; {a:'x','a':'y'}",
    )


def test_strings_hold_any_text_but_control_tokens() -> None:
    schema = {"type": "object", "properties": {"s": TEXT}, "required": ["s"]}
    check(
        schema,
        "{s:''} ; {s:'}, {\"x\": 1}\n\\ <tool_call> 🦄'}",
        "{s:'<turn|>'} ; {s:'<tool_call|>'} ; {s:x} ; {s:'''} ; {s:\"x\"} ; {s:'x}",
    )


def test_strings_of_a_kind() -> None:
    properties = {
        "len": {"type": "string", "minLength": 2, "maxLength": 3},
        "pat": {"type": "string", "pattern": r"^\d+-|x$"},
        "both": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 2},
        "date": {"type": "string", "format": "date"},
    }
    check(
        {"type": "object", "properties": properties},
        (
            "{len:'ab'} ; {len:'🦄🦄🦄'} ; {pat:'12-abc'} ; {pat:'ax'} ; {both:'az'} ; "
            "{date:'2024-02-28'}"
        ),
        (
            "{len:'a'} ; {len:'abcd'} ; {pat:'a12-'} ; {pat:'٣-'} ; {both:'abc'} ; "
            "{both:'a1'} ; {date:'2024-02-30'} ; {date:'today'}"
        ),
    )


def test_numbers_are_within_their_bounds() -> None:
    properties = {
        "n": {"type": "number", "minimum": 0, "maximum": 1},
        "i": {"type": "integer", "exclusiveMinimum": 0, "multipleOf": 5, "maximum": 15},
        "z": WHOLE,
    }
    check(
        {"type": "object", "properties": properties},
        "{n:0.25} ; {n:1} ; {i:15} ; {z:-12} ; {z:0}",
        ("{n:1.5} ; {n:-0.1} ; {i:0} ; {i:7} ; {i:20} ; {z:1.5} ; {z:01} ; {z:'1'} ; {z:+1}"),
    )


def test_alternatives_and_values() -> None:
    properties = {
        "u": {"anyOf": [TEXT, {"type": "null"}, {"type": "array", "items": WHOLE}]},
        "t": {"type": ["boolean", "null"]},
        "e": {"enum": ["red", 1, None, [1, "x"], {"b": 1, "a": "y"}]},
        "c": {"type": "string", "const": "only"},
        "n": {"type": ["string", "null"], "enum": ["a", None, 5]},
        "o": TEXT | {"nullable": True},
    }
    check(
        {"type": "object", "properties": properties},
        (
            "{u:''} ; {u:null} ; {u:[1,2]} ; {t:true} ; {t:null} ; {e:'red'} ; {e:1} ; "
            "{e:null} ; {e:[1,'x']} ; {e:{a:'y',b:1}} ; {c:'only'} ; {n:null} ; {n:'a'} ; "
            "{o:null}"
        ),
        (
            "{u:1} ; {u:['x']} ; {t:'true'} ; {e:'blue'} ; {e:2} ; {e:[1]} ; {e:{}} ; "
            "{c:'x'} ; {n:5} ; {n:'b'}"
        ),
    )


def test_lists_have_as_many_items_as_they_may() -> None:
    properties = {
        "some": {"type": "array", "items": WHOLE, "minItems": 1, "maxItems": 3},
        "any": {"type": "array"},
        "none": {"type": "array", "items": WHOLE, "maxItems": 0},
        "two": {"type": "array", "prefixItems": [WHOLE, TEXT], "items": False, "minItems": 1},
        "more": {"type": "array", "prefixItems": [TEXT], "items": WHOLE, "minItems": 2},
        "old": {"type": "array", "items": [WHOLE, TEXT], "additionalItems": False},
    }
    check(
        {"type": "object", "properties": properties},
        (
            "{some:[1]} ; {some:[1,2,3]} ; {any:[]} ; {any:[1,'x',[null]]} ; {none:[]} ; "
            "{two:[1]} ; {two:[1,'x']} ; {more:['x',1]} ; {more:['x',1,2,3]} ; {old:[]}"
        ),
        (
            "{some:[]} ; {some:[1,2,3,4]} ; {some:['x']} ; {any:[,]} ; {none:[1]} ; "
            "{two:[]} ; {two:[1,'x',2]} ; {two:['x']} ; {more:['x']} ; {more:[1,2]} ; "
            "{old:[1,'x',2]}"
        ),
    )


def test_a_schema_may_contain_itself() -> None:
    node = {
        "type": "object",
        "properties": {"v": WHOLE, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["v"],
    }
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/node"}},
        "$defs": {"node": node},
    }
    check(schema, "{n:{v:1,next:{next:{v:3},v:2}}} ; {}", "{n:{next:{v:1}}} ; {n:{v:1,next:{}}}")
    root = {"type": "object", "properties": {"child": {"$ref": "#"}}}
    check(root, "{} ; {child:{child:{}}}", "{child:1}")


def test_schemas_are_put_together() -> None:
    schema = {
        "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": WHOLE}, "required": ["b"]}],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
        "$defs": {"base": {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}},
    }
    check(schema, "{a:'x',b:1} ; {b:1,a:''}", "{a:'x'} ; {b:1} ; {a:1,b:1} ; {a:'x',b:1,c:1}")


def test_names_that_could_be_misread_are_quoted() -> None:
    schema = {
        "type": "object",
        "properties": {"a:b": WHOLE, "$ref": WHOLE, "x y": WHOLE, "": WHOLE},
    }
    check(schema, "{'a:b':1,$ref:2,'x y':3,'':4}", "{a:b:1} ; {x y:1} ; {:1}")


def test_one_of_objects_told_apart_by_a_constant() -> None:
    kinds = [
        {
            "type": "object",
            "properties": {"k": {"const": k}, k: WHOLE},
            "required": ["k", k],
        }
        for k in ("one", "two")
    ]
    schema = {"type": "object", "properties": {"x": {"oneOf": kinds}}}
    check(schema, "{x:{one:1,k:'one'}} ; {x:{k:'two',two:2}}", "{x:{k:'two',one:1}} ; {x:{}}")


@pytest.mark.parametrize(
    ("schema", "pointer", "keyword"),
    [
        ({"oneOf": [TEXT, {"type": "string", "maxLength": 3}]}, "#/properties/a", "oneOf"),
        ({"patternProperties": {"^a": TEXT}}, "#/properties/a", "patternProperties"),
        ({"type": "object", "maxProperties": 3}, "#/properties/a", "maxProperties"),
        ({"$ref": "#/$defs/x"}, "#/properties/a", "$ref"),
        ({"$ref": "#/properties/a"}, "#/properties/a", "$ref"),
        ({"type": "string", "minLength": -1}, "#/properties/a", "minLength"),
        ({"type": "string", "pattern": 3}, "#/properties/a", "pattern"),
        ({"type": "array", "maxItems": "3"}, "#/properties/a", "maxItems"),
        ({"type": "array", "items": False, "minItems": 1}, "#/properties/a", "minItems"),
        ({"enum": ["a"], "minLength": 3}, "#/properties/a", "minLength"),
        ({"enum": []}, "#/properties/a", "type"),
        ({"type": "integer", "enum": ["a"]}, "#/properties/a", "type"),
        ({"type": "object", "required": "b"}, "#/properties/a", "required"),
        (
            {"type": "object", "properties": {"b": False}, "required": ["b"]},
            "properties/b",
            "false",
        ),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "#/properties/a", "pattern"),
        ({"properties": {f"p{i}": TEXT for i in range(65)}}, "#/properties/a", "properties"),
    ],
)
def test_what_can_not_be_enforced_is_refused(schema: Any, pointer: str, keyword: str) -> None:
    parameters = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(InvalidRequest) as caught:
        grammar_of(parameters)
    assert pointer in caught.value.message and f"'{keyword}'" in caught.value.message
    loose = grammar_of(parameters, is_strict=False)
    assert accepts(loose, "{}")


def test_references_do_not_multiply_without_end() -> None:
    definitions: dict[str, Any] = {"d20": {"type": "object"}}
    for i in range(20):
        # What stands beside a reference makes it another schema.
        inner = {"$ref": f"#/$defs/d{i + 1}", "required": []}
        definitions[f"d{i}"] = {"type": "object", "properties": {"a": inner, "b": inner}}
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": definitions}
    with pytest.raises(InvalidRequest, match="too deeply or too large"):
        grammar_of(schema)
    assert accepts(grammar_of(schema, is_strict=False), "{}")


def test_an_object_may_have_to_have_something() -> None:
    schema = {"type": "object", "properties": {"a": WHOLE}, "minProperties": 1}
    check(schema, "{a:1} ; {b:null} ; {b:1,a:2}", "{} ; {a:null}")
