"""JSON schemas as the model gets to see them."""

from collections.abc import Callable
from typing import Any

import pytest

from bezel.engine.errors import InvalidRequest
from bezel.server.tool_schema import SchemaReader

STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def shown(schema: dict[str, Any], **root: Any) -> Any:
    """What becomes of a parameter's schema."""
    parameters = {"type": "object", "properties": {"p": schema}, **root}
    return SchemaReader().read(parameters, "parameters")["properties"]["p"]


SCHEMAS: dict[str, tuple[Any, Any]] = {
    "plain": ({"type": "string", "description": "d"}, {"type": "string", "description": "d"}),
    "other keywords": ({"type": "integer", "minimum": 1, "title": "P", "default": 2}, INTEGER),
    "enum": ({"type": "string", "enum": ["a", "b"]}, {"type": "string", "enum": ["a", "b"]}),
    "enum alone": ({"enum": ["a", None]}, {"type": "string", "enum": ["a"], "nullable": True}),
    "const": ({"const": "a"}, {"type": "string", "enum": ["a"]}),
    "enum of numbers": (
        {"type": "integer", "enum": [1, 2], "description": "d"},
        {"type": "integer", "description": "d (one of: 1, 2)"},
    ),
    "const true": ({"const": True}, {"type": "boolean", "description": "one of: true"}),
    "null": ({"type": "null"}, {"type": "null"}),
    "const null": ({"const": None}, {"type": "null"}),
    "upper case": ({"type": "STRING"}, STRING),
    "nullable": ({"type": "string", "nullable": True}, {"type": "string", "nullable": True}),
    "optional": (
        {"anyOf": [STRING, {"type": "null"}], "description": "d", "default": None},
        {"type": "string", "description": "d", "nullable": True},
    ),
    "optional, null first": (
        {"oneOf": [{"type": "null"}, INTEGER]},
        {"type": "integer", "nullable": True},
    ),
    "type and null": ({"type": ["null", "string"]}, {"type": "string", "nullable": True}),
    "optional enum": (
        {"type": ["string", "null"], "enum": ["a", None]},
        {"type": "string", "enum": ["a"], "nullable": True},
    ),
    "several types": (
        {"type": ["integer", "string", "null"], "description": "d"},
        {"type": "integer", "description": "d (or: string)", "nullable": True},
    ),
    "a union": (
        {"anyOf": [INTEGER, {"type": "array", "items": INTEGER}]},
        {"type": "integer", "description": "or: array"},
    ),
    "a union in a union": (
        {"anyOf": [{"anyOf": [STRING, {"type": "null"}]}, INTEGER]},
        {"type": "string", "description": "or: integer", "nullable": True},
    ),
    "a union of words": (
        {"anyOf": [{"const": "a"}, {"enum": ["b", "a"]}]},
        {"type": "string", "enum": ["a", "b"]},
    ),
    "words and any text": ({"anyOf": [{"const": "a"}, STRING]}, STRING),
    "a union of objects": (
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": "a"}, "x": INTEGER},
                    "required": ["kind", "x"],
                },
                {
                    "type": "object",
                    "properties": {"kind": {"const": "b"}, "y": STRING},
                    "required": ["y", "kind"],
                },
            ]
        },
        {
            "type": "object",
            "properties": {
                "kind": {"type": "string", "enum": ["a", "b"]},
                "x": INTEGER,
                "y": STRING,
            },
            "required": ["kind"],
        },
    ),
    "object": (
        {"type": "object", "additionalProperties": False},
        {"type": "object", "properties": {}},
    ),
    "object by its properties": (
        {"properties": {"a": {}}},
        {"type": "object", "properties": {"a": {"type": "any"}}},
    ),
    "list": ({"type": "array", "items": STRING}, {"type": "array", "items": STRING}),
    "list by its items": (
        {"items": {"type": ["string", "null"], "title": "X"}},
        {"type": "array", "items": {"type": "string", "nullable": True}},
    ),
    "list of anything": (
        {"type": "array", "items": True},
        {"type": "array", "items": {"type": "any"}},
    ),
    "list of unknowns": ({"type": "array"}, {"type": "array"}),
    "tuple": (
        {"type": "array", "prefixItems": [INTEGER, STRING]},
        {"type": "array", "items": {"type": "integer", "description": "or: string"}},
    ),
    "anything": ({}, {"type": "any"}),
    "true": (True, {"type": "any"}),
    "all of": (
        {
            "allOf": [
                {"properties": {"a": STRING}, "required": ["a"]},
                {"properties": {"b": INTEGER}, "required": ["b"], "description": "inner"},
            ],
            "description": "outer",
        },
        {
            "type": "object",
            "description": "outer",
            "properties": {"a": STRING, "b": INTEGER},
            "required": ["b", "a"],
        },
    ),
}


@pytest.mark.parametrize(("schema", "expected"), SCHEMAS.values(), ids=SCHEMAS)
def test_schemas(schema: Any, expected: Any) -> None:
    assert shown(schema) == expected


DEFS = {"X": {"type": "string", "description": "an X"}, "a/b~c d": INTEGER, "list": [STRING]}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "#/$defs/X"}, {"type": "string", "description": "an X"}),
        ({"$ref": "#/$defs/X", "description": "p"}, {"type": "string", "description": "p"}),
        ({"allOf": [{"$ref": "#/$defs/X"}]}, {"type": "string", "description": "an X"}),
        (
            {"anyOf": [{"$ref": "#/$defs/X"}, {"type": "null"}]},
            {"type": "string", "description": "an X", "nullable": True},
        ),
        (
            {"type": "array", "items": {"$ref": "#/$defs/a~1b~0c%20d"}},
            {"type": "array", "items": INTEGER},
        ),
        ({"$ref": "#/$defs/list/0"}, STRING),
    ],
)
def test_references(schema: Any, expected: Any) -> None:
    assert shown(schema, **{"$defs": DEFS}) == expected


def test_a_schema_that_contains_itself_is_shown_once() -> None:
    node = {
        "type": "object",
        "properties": {
            "value": INTEGER,
            "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            "children": {"type": "array", "items": {"$ref": "#/$defs/Node", "description": "more"}},
        },
    }
    assert shown({"$ref": "#/$defs/Node"}, **{"$defs": {"Node": node}}) == {
        "type": "object",
        "properties": {
            "value": INTEGER,
            "next": {"type": "object", "properties": {}, "nullable": True},
            "children": {
                "type": "array",
                "items": {"type": "object", "properties": {}, "description": "more"},
            },
        },
    }
    assert shown({"$ref": "#"})["properties"]["p"] == {"type": "object", "properties": {}}


def test_parts_may_share_a_base_and_contain_the_whole() -> None:
    base = {"properties": {"a": STRING}}
    left = {"allOf": [{"$ref": "#/$defs/Base"}], "properties": {"b": {"$ref": "#/$defs/Left"}}}
    right = {"allOf": [{"$ref": "#/$defs/Base"}], "properties": {"c": STRING}}
    both = {"allOf": [{"$ref": "#/$defs/Left"}, {"$ref": "#/$defs/Right"}]}
    assert shown(both, **{"$defs": {"Base": base, "Left": left, "Right": right}}) == {
        "type": "object",
        "properties": {"a": STRING, "b": {"type": "object", "properties": {}}, "c": STRING},
    }


def test_the_whole_may_be_a_reference() -> None:
    schema = {"$ref": "#/$defs/Args", "$defs": {"Args": {"properties": {"a": STRING}}}}
    assert SchemaReader().read(schema, "x") == {"type": "object", "properties": {"a": STRING}}


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"properties": {"a": DEEP}}


def growing(num: int, grow: Callable[[dict[str, str]], dict[str, Any]]) -> dict[str, Any]:
    """Definitions of which each is made of the next."""
    refs = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(num)]
    return {"$defs": {f"d{i}": grow(ref) for i, ref in enumerate(refs)} | {f"d{num}": STRING}}


CHAIN = growing(40, lambda ref: ref)
TREE = growing(6, lambda ref: {"properties": dict.fromkeys("abcdefgh", ref)})
UNIONS = growing(6, lambda ref: {"anyOf": [ref] * 8})
PARTS = growing(6, lambda ref: {"allOf": [ref] * 8})
FIRST = {"$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("schema", "root", "message"),
    [
        (1, {}, "at #/properties/p: must be a JSON schema"),
        ({"type": 1}, {}, "at #/properties/p/type: must be a string"),
        ({"type": [1]}, {}, "must be a string"),
        (
            {"type": "object", "properties": []},
            {},
            "at #/properties/p/properties: must be an object",
        ),
        ({"type": "object", "required": "a"}, {}, "at #/properties/p/required: must be a list"),
        ({"type": "string", "enum": {}}, {}, "at #/properties/p/enum: must be a list"),
        ({"anyOf": {}}, {}, "at #/properties/p/anyOf: must be a list"),
        ({"allOf": {}}, {}, "at #/properties/p/allOf: must be a list"),
        ({"anyOf": [1]}, {}, "at #/properties/p/anyOf/0: must be a JSON schema"),
        ({"$ref": "#/$defs/Y"}, {}, "'#/.defs/Y' isn't there"),
        ({"$ref": "#/$defs/l/1"}, {"$defs": {"l": [{}]}}, "isn't there"),
        ({"$ref": "other.json"}, {}, "only references within"),
        ({"$ref": 1}, {}, "only references within"),
        (DEEP, {}, "nested more than 32 deep"),
        (FIRST, CHAIN, "too large"),
        (FIRST, TREE, "more than 10000"),
        (FIRST, UNIONS, "too large"),
        (FIRST, PARTS, "too large"),
    ],
)
def test_bad_schemas_are_refused_by_place(schema: Any, root: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        shown(schema, **root)
    assert error.value.param == "parameters"
