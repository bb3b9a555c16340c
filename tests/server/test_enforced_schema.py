"""Which schemas can be enforced, and by which words the others are refused."""

from typing import Any

import pytest

from bezel.engine.errors import InvalidRequest
from bezel.server.grammars.enforced_schema import enforced_schema

TEXT = {"type": "string"}


def refusal(schema: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        enforced_schema(schema, "response_format")
    assert caught.value.param == "response_format"
    return caught.value.message


# Every keyword of every draft that isn't enforced.
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("not", {"const": 1}),
        ("if", TEXT),
        ("then", TEXT),
        ("else", TEXT),
        ("contains", TEXT),
        ("minContains", 1),
        ("maxContains", 1),
        ("uniqueItems", True),
        ("unevaluatedItems", False),
        ("unevaluatedProperties", False),
        ("propertyNames", {"pattern": "a"}),
        ("dependencies", {"a": ["b"]}),
        ("dependentRequired", {"a": ["b"]}),
        ("dependentSchemas", {"a": TEXT}),
        ("$dynamicRef", "#a"),
        ("$recursiveRef", "#"),
        ("$anchor", "a"),
        ("extends", TEXT),
        ("disallow", "string"),
        ("divisibleBy", 2),
        ("contentSchema", TEXT),
        ("maxLenght", 3),
        ("components", {}),
    ],
)
def test_what_can_not_be_enforced_is_refused_by_name_and_place(keyword: str, value: Any) -> None:
    schema = {"type": "object", "properties": {"a/b": {"type": "array", "items": {keyword: value}}}}
    message = refusal(schema)
    assert f"at #/properties/a~1b/items/{keyword}:" in message and f"'{keyword}'" in message


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "strnig"}, "#/type"),
        ({"type": []}, "#/type"),
        ({"type": None}, "#/type"),
        ({"type": ["string", {}]}, "#/type"),
        ({"type": "string", "format": "regex"}, "#/format"),
        ({"format": ["date"]}, "#/format"),
        ({"$ref": "https://example.com/schema"}, "#/$ref"),
        ({"$ref": "other.json#/a"}, "#/$ref"),
        ({"$ref": 3}, "#/$ref"),
        ({"anyOf": {}}, "#/anyOf"),
        ({"anyOf": [TEXT, 3]}, "#/anyOf/1"),
        ({"properties": []}, "#/properties"),
        ({"items": "string"}, "#/items"),
        ({"minProperties": 2}, "#/minProperties"),
        ({"minProperties": -1}, "#/minProperties"),
        ({"minProperties": True}, "#/minProperties"),
        ("string", "#"),
        (None, "#"),
        ([], "#"),
    ],
)
def test_what_is_no_schema_is_refused_by_place(schema: Any, pointer: str) -> None:
    assert f"at {pointer}:" in refusal(schema)


def test_a_schema_without_an_end_is_refused() -> None:
    schema: Any = {}
    for _ in range(1000):
        schema = {"items": schema}
    assert "nested too deeply" in refusal(schema)
    assert "too large" in refusal({"anyOf": [TEXT] * 30_000})


def test_annotations_say_nothing_of_values() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "title": "T",
        "description": "D",
        "default": 1,
        "examples": [1],
        "deprecated": True,
        "x-order": 3,
        "uniqueItems": False,
        "type": "array",
        "items": {"type": "integer", "format": "int64", "description": "d"},
    }
    assert enforced_schema(schema, "p") == {"type": "array", "items": {"type": "integer"}}


def test_names_of_properties_are_not_keywords() -> None:
    schema = {"type": "object", "properties": {"not": TEXT, "title": TEXT}, "$defs": {"if": TEXT}}
    assert enforced_schema(schema, "p") == schema | {"additionalProperties": False}


def test_values_are_not_schemas() -> None:
    schema = {"enum": [{"not": 1}, {"title": 2}]}
    assert enforced_schema(schema, "p") == schema


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"a": TEXT}}, True),
        ({"properties": {}}, True),
        ({"type": "object"}, False),
        ({"properties": {"a": TEXT}, "additionalProperties": True}, False),
        ({"properties": {"a": TEXT}, "minProperties": 1}, False),
        ({"properties": {"a": TEXT}, "anyOf": [{"required": ["a"]}]}, False),
        ({"properties": {"a": TEXT}, "patternProperties": {"^x": TEXT}}, False),
        ({"allOf": [{"properties": {"a": TEXT}}, {"properties": {"b": TEXT}}]}, False),
    ],
)
def test_objects_that_name_properties_have_no_others(schema: Any, closed: bool) -> None:
    enforced = enforced_schema(schema, "p")
    inner = enforced.get("allOf", [enforced])[0]
    assert (inner.get("additionalProperties", True) is False) == closed


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, {"type": ["string", "null"]}),
        ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
        ({"type": "string", "enum": ["a"]}, {"type": ["string", "null"], "enum": ["a", None]}),
        ({"const": 1}, {"enum": [1, None]}),
        ({"anyOf": [TEXT]}, {"anyOf": [TEXT, {"type": "null"}]}),
        ({"$ref": "#/$defs/a"}, {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}),
    ],
)
def test_openapis_nullable_is_enforced(schema: Any, expected: Any) -> None:
    assert enforced_schema(schema | {"nullable": True}, "p") == expected
    assert enforced_schema(schema | {"nullable": False}, "p") == schema


def test_a_minimum_of_properties_that_must_be_there_anyway_says_nothing() -> None:
    schema = {"required": ["a", "b"], "minProperties": 2}
    assert enforced_schema(schema, "p") == {"required": ["a", "b"]}


def test_one_of_alternatives_that_exclude_each_other_is_any_of_them() -> None:
    apart = {"oneOf": [{"type": "string"}, {"$ref": "#/$defs/n"}], "$defs": {"n": {"const": 1}}}
    assert "anyOf" in enforced_schema(apart, "p")
    alike = {"items": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}
    assert "at #/items/oneOf: 'oneOf'" in refusal(alike)
    assert "anyOf" in enforced_schema({"oneOf": [{"const": i} for i in range(100)]}, "p")


def test_where_nobody_insists_what_can_not_be_enforced_is_left_out() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "not": {}, "format": "x", "pattern": "(?=a)"}},
        "propertyNames": {},
        "oneOf": [{"required": ["a"]}, {}],
    }
    assert enforced_schema(schema, "p", is_strict=False) == {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "anyOf": [{"required": ["a"]}, {}],
    }
