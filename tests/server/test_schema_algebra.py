"""Schemas put together and told apart, with values that fit as the judge."""

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.server.grammars.schema_algebra import NotEnforceable, are_disjoint, joined, target_of

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 3, -2, 1.5, "", "a", "abc", "abcdef", [], [1], ["a", 2]),
    *({}, {"a": 1}, {"a": "x"}, {"b": 1}, {"a": 1, "b": "y"}, {"k": "one"}, {"k": "two", "a": 1}),
]
SCHEMAS: list[Any] = [
    True,
    False,
    {"type": "string"},
    {"type": ["string", "null"]},
    {"type": "number"},
    {"type": "integer", "minimum": 1},
    {"type": "number", "maximum": 2, "minimum": -5},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "maxLength": 3},
    {"enum": ["a", 1, None]},
    {"enum": [1, 3, "abc"]},
    {"const": 1},
    {"type": "object", "required": ["a"]},
    {"type": "object", "required": ["b"], "properties": {"b": {"type": "string"}}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "properties": {"k": {"const": "one"}}, "required": ["k"]},
    {"type": "object", "properties": {"k": {"enum": ["two", "x"]}}, "required": ["k"]},
    {"type": "array", "minItems": 1},
    {"type": "array", "items": {"type": "integer"}},
    {"anyOf": [{"type": "string"}, {"const": 3}]},
]


def fits(schema: Any, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SCHEMAS), st.sampled_from(SCHEMAS))
def test_what_fits_both_fits_the_joined_schema_and_nothing_else(first: Any, second: Any) -> None:
    try:
        both = joined(first, second)
    except NotEnforceable:
        return
    for value in VALUES:
        assert fits(both, value) == (fits(first, value) and fits(second, value))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SCHEMAS), st.sampled_from(SCHEMAS))
def test_nothing_fits_two_schemas_that_are_disjoint(first: Any, second: Any) -> None:
    if are_disjoint(first, second, lambda schema: schema):
        for value in VALUES:
            assert not (fits(first, value) and fits(second, value))


@pytest.mark.parametrize(
    ("first", "second", "disjoint"),
    [
        ({"type": "string"}, {"type": "null"}, True),
        ({"type": "integer"}, {"type": "number"}, False),
        ({"const": "a"}, {"const": "b"}, True),
        ({"const": 1}, {"enum": [2, 3]}, True),
        (SCHEMAS[15], SCHEMAS[16], True),
        ({"anyOf": [{"type": "null"}, {"type": "array"}]}, {"type": "string"}, True),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, {"type": "string"}, False),
        ({}, {"type": "string"}, False),
        # Whatever isn't an object has no properties that could tell.
        (
            {"required": ["k"], "properties": {"k": {"const": 1}}},
            {"required": ["k"], "properties": {"k": {"const": 2}}},
            False,
        ),
        ({"type": "string", "maxLength": 1}, {"type": "string", "minLength": 2}, False),
    ],
)
def test_disjoint(first: Any, second: Any, disjoint: bool) -> None:
    assert are_disjoint(first, second, lambda schema: schema) == disjoint
    assert are_disjoint(second, first, lambda schema: schema) == disjoint


@pytest.mark.parametrize(
    ("first", "second", "keyword"),
    [
        ({"pattern": "a"}, {"pattern": "b"}, "pattern"),
        ({"anyOf": [{}]}, {"anyOf": [True]}, "anyOf"),
        (SCHEMAS[14], SCHEMAS[13], "additionalProperties"),
        (SCHEMAS[13], SCHEMAS[14], "additionalProperties"),
    ],
)
def test_what_one_schema_can_not_say_is_named(first: Any, second: Any, keyword: str) -> None:
    with pytest.raises(NotEnforceable, match=keyword):
        joined(first, second)


def test_references_are_json_pointers() -> None:
    root = {"$defs": {"a/b~c": {"anyOf": [{"type": "null"}, {"type": "string"}]}, "é": {}}}
    assert target_of(root, "#") is root
    assert target_of(root, "#/$defs/a~1b~0c/anyOf/1") == {"type": "string"}
    assert target_of(root, "#/%24defs/%C3%A9") == {}
    for missing in ("#/$defs/x", "#/$defs/a~1b~0c/anyOf/2", "#/$defs/é/x"):
        with pytest.raises(NotEnforceable, match="isn't there"):
            target_of(root, missing)
