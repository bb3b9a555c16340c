"""Schemas for outputs and for tools, and a plain reading of calls to judge them by."""

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
from grammar_walks import CALL_CLOSE, CALL_OPEN, QUOTE, bytes_of

TEXT = {"type": "string"}
SHORT = {"type": "string", "maxLength": 12}
WHOLE = {"type": "integer", "minimum": -999, "maximum": 999}

# Of the kinds that clients send: pydantic's, OpenAPI's, OpenAI's examples.
SCHEMAS: dict[str, Any] = {
    "object": {"type": "object", "properties": {"a": TEXT, "b": WHOLE}, "required": ["a"]},
    "open object": {"type": "object"},
    "map": {"type": "object", "additionalProperties": WHOLE},
    "some of many": {"type": "object", "properties": {f"p{i}": WHOLE for i in range(12)}},
    "list": {"type": "array", "items": SHORT, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [SHORT, WHOLE], "items": False, "minItems": 2},
    "text": {"type": "string", "minLength": 3, "maxLength": 20},
    "enum": {"enum": ["red", "grün", 'a "quoted" word', 3, None, {"x": [1]}]},
    "number": {"type": "number", "minimum": -1.5, "maximum": 1000},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 7000},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "search": {"type": "string", "pattern": "[0-9]!", "maxLength": 15},
    "formats": {
        "type": "object",
        "properties": {
            name: {"type": "string", "format": name}
            for name in ("date", "ipv4", "ipv6", "uuid", "email", "time")
        },
        "required": ["date", "ipv4", "ipv6", "uuid"],
    },
    "optional": {
        "type": "object",
        "properties": {"x": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}},
        "required": ["x"],
        "$defs": {
            "Point": {
                "type": "object",
                "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
                "required": ["lat", "lon"],
            }
        },
    },
    "tree": {
        "$ref": "#/$defs/Node",
        "$defs": {
            "Node": {
                "type": "object",
                "properties": {
                    "name": SHORT,
                    "children": {
                        "type": "array",
                        "items": {"$ref": "#/$defs/Node"},
                        "maxItems": 2,
                    },
                },
                "required": ["name"],
            }
        },
    },
    "kinds": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, kind: inner},
                "required": ["kind", kind],
            }
            for kind, inner in (("circle", WHOLE), ("label", SHORT), ("flag", {"type": "boolean"}))
        ]
    },
    "mixed": {"type": ["integer", "boolean", "null", "array"], "items": WHOLE, "maximum": 5},
    "joined": {
        "type": "object",
        "allOf": [
            {"properties": {"a": WHOLE}, "required": ["a"]},
            {"properties": {"b": SHORT}, "required": ["b"]},
        ],
        # Without it any number of others might come before these.
        "properties": {"a": True, "b": True},
        "additionalProperties": False,
    },
    "nullable": {"type": "object", "properties": {"n": SHORT | {"nullable": True}}},
    "odd names": {
        "type": "object",
        "properties": {"a b": WHOLE, "c:d": WHOLE, "$e": WHOLE, "größe": WHOLE},
        "required": ["a b", "c:d"],
    },
}
# Arguments are objects; anything else is one of them.
PARAMETERS: dict[str, Any] = {
    name: schema
    if schema.get("type") == "object" or name in ("tree", "kinds")
    else {"type": "object", "properties": {"value": schema}, "required": ["value"]}
    for name, schema in SCHEMAS.items()
}


def check(value: Any, schema: Any) -> None:
    """Raises `jsonschema.ValidationError` where a value doesn't fit."""
    schema = json.loads(json.dumps(schema))
    for inner in schema.get("properties", {}).values():
        if inner is not True and inner.pop("nullable", False):
            inner["type"] = [inner["type"], "null"]
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(value)


def calls_of(token_ids: Sequence[int]) -> list[tuple[str, Any]]:
    """Names and arguments of an output that is nothing but calls."""
    calls = []
    pending = list(token_ids)
    while pending:
        assert pending[0] == CALL_OPEN
        end = pending.index(CALL_CLOSE)
        calls.append(_Reader(pending[1:end]).call())
        pending = pending[end + 1 :]
    return calls


class _Reader:
    """A call's text as characters, with the quote token as None."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._symbols: list[str | None] = []
        parts: list[list[int]] = [[]]
        for token_id in token_ids:
            if token_id == QUOTE:
                parts.append([])
            else:
                parts[-1].append(token_id)
        for i, part in enumerate(parts):
            self._symbols += [None] if i else []
            self._symbols += b"".join(map(bytes_of, part)).decode()
        self._at = 0

    def call(self) -> tuple[str, Any]:
        assert self._word("{").startswith("call:")
        name = "".join(filter(None, self._symbols[5 : self._at]))
        arguments = self._value()
        assert self._at == len(self._symbols)
        return name, arguments

    def _take(self) -> str | None:
        self._at += 1
        return self._symbols[self._at - 1]

    def _word(self, ends: str) -> str:
        """Characters up to one of `ends`, which stays."""
        word = ""
        while (symbol := self._symbols[self._at]) is None or symbol not in ends:
            assert symbol is not None, "a string in the middle of something"
            word += symbol
            self._at += 1
        return word

    def _string(self) -> str:
        assert self._take() is None
        text = ""
        while (symbol := self._take()) is not None:
            text += symbol
        return text

    def _value(self) -> Any:
        match self._symbols[self._at]:
            case None:
                return self._string()
            case "{":
                return self._object()
            case "[":
                items = []
                while self._take() != "]":
                    if self._symbols[self._at] == "]":
                        assert not items
                        continue
                    items.append(self._value())
                    assert self._symbols[self._at] in (",", "]")
                return items
            case _:
                return json.loads(self._word(",}]"))

    def _object(self) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while self._take() != "}":
            if self._symbols[self._at] == "}":
                assert not members
                continue
            quoted = self._symbols[self._at] is None
            name = self._string() if quoted else self._word(":")
            assert self._take() == ":"
            members[name] = self._value()
            assert self._symbols[self._at] in (",", "}")
        return members
