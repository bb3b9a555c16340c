"""A function's parameters, a JSON schema, as rules for arguments in Gemma's syntax.

    {"city": string, "days": integer}, city required

    object_1: "{" first_2::0x0
    first_2::_: "}" %if is_ones([0:1]) | "city:" value more_3::set_bit(0) | …
    more_3::_:  "}" %if is_ones([0:1]) | "," "days:" value more_3::set_bit(1) %if bit_clear(1) | …

Names are bare and strings stand between two quote tokens, so they may hold any text. Properties
come in any order, each once: a rule carries which of them have come as bits, the required ones
lowest. There is no whitespace, as in the calls that chat templates show.
"""

from typing import Any

from bezel.engine.errors import InvalidRequest
from bezel.server.grammars.call_syntax import CallSyntax, is_length
from bezel.server.grammars.enforced_schema import TYPES, enforced_schema
from bezel.server.grammars.schema_algebra import (
    NotEnforceable,
    Schema,
    joined,
    target_of,
    type_of_value,
    types_of,
)

_ALL_TYPES = sorted(TYPES - {"integer"})  # a number may be one
_MAX_PROPERTIES = 64  # bits of a rule's parameter
_MAX_DEPTH = 64
_MAX_RULES = 5_000
# What a schema without a type is about; of values of other types these keywords say nothing.
_KEYWORDS_OF_TYPES = {
    "object": ("properties", "required", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "additionalItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


def argument_rule(parameters: Any, syntax: CallSyntax, param: str, *, is_strict: bool) -> str:
    """An expression for `{…}` with arguments that fit `parameters`; its rules go to `syntax`.

    Not `is_strict`: what can't be enforced isn't.

    Raises:
        InvalidRequest: a keyword can't be enforced; `param` is the field of the parameters.
    """
    if parameters in (None, {}):
        return '"{}"'
    try:
        root = enforced_schema(parameters, param, is_strict=is_strict)
        return _Parameters(root, syntax, param, is_strict).rule()
    except InvalidRequest:
        if is_strict:
            raise
        return syntax.any_object()


class _Parameters:
    """One function's parameters on their way into rules."""

    def __init__(self, root: Any, syntax: CallSyntax, param: str, is_strict: bool) -> None:
        self._root, self._syntax, self._param = root, syntax, param
        self._is_strict = is_strict
        self._rules_of_references: dict[str, str] = {}

    def rule(self) -> str:
        try:
            whole = joined(self._resolved(self._root), {"type": "object"})
        except NotEnforceable as error:
            raise self._problem(error, "#") from error
        return self._value(whole, "#", 0)

    def _value(self, schema: Any, pointer: str, depth: int) -> str:
        """An expression that matches the values of a schema."""
        try:
            if depth > _MAX_DEPTH or self._syntax.num_rules > _MAX_RULES:
                raise NotEnforceable("$ref", "the schema is nested too deeply or too large")
            return self._expression(schema, pointer, depth)
        except NotEnforceable as error:
            if self._is_strict:
                raise self._problem(error, pointer) from error
            return self._syntax.any_value()

    def _problem(self, error: NotEnforceable, pointer: str) -> InvalidRequest:
        return InvalidRequest(f"{self._param}, at {pointer:.300}: {error}", self._param)

    def _expression(self, schema: Any, pointer: str, depth: int) -> str:
        """One way of applying several schemas at a time, until there is none left."""
        if schema is True or schema == {}:
            return self._syntax.any_value()
        if schema is False:
            raise NotEnforceable("false", "no value fits it")
        if schema.keys() == {"$ref"}:
            return self._reference(schema["$ref"], depth)
        if "$ref" in schema:
            target = target_of(self._root, schema["$ref"])
            return self._value(joined(_without(schema, "$ref"), target), pointer, depth + 1)
        if "allOf" in schema:
            whole: Any = _without(schema, "allOf")
            for part in schema["allOf"]:
                whole = joined(whole, self._resolved(part))
            return self._value(whole, pointer, depth + 1)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._union(schema, keyword, pointer, depth)
        if "const" in schema or "enum" in schema:
            return self._literals(schema)
        kinds = types_of(schema)
        kinds = _types_it_is_about(schema) if kinds is None else kinds
        return self._any_of([self._typed(kind, schema, pointer, depth) for kind in kinds])

    def _resolved(self, schema: Any) -> Any:
        """What a schema refers to, if it does nothing else."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or schema.keys() != {"$ref"}:
                return schema
            schema = target_of(self._root, schema["$ref"])
        raise NotEnforceable("$ref", "it refers to itself")

    def _reference(self, reference: str, depth: int) -> str:
        """A rule for each target, so that it may contain itself."""
        if reference not in self._rules_of_references:
            target = self._resolved({"$ref": reference})
            name = self._rules_of_references[reference] = self._syntax.new_name("ref")
            self._syntax.define(name, self._value(target, reference, depth + 1))
        return self._rules_of_references[reference]

    def _union(self, schema: Schema, keyword: str, pointer: str, depth: int) -> str:
        if keyword == "oneOf":
            # Where only one can fit, it has become `anyOf`.
            raise NotEnforceable("oneOf", "a value might fit two of them")
        variants = [self._resolved(variant) for variant in schema[keyword]]
        common = _without(schema, keyword)
        return self._any_of(
            [
                self._value(
                    joined(common, variant) if common else schema[keyword][i],
                    f"{pointer}/{keyword}/{i}",
                    depth + 1,
                )
                for i, variant in enumerate(variants)
            ]
        )

    def _any_of(self, expressions: list[str]) -> str:
        if not expressions:
            raise NotEnforceable("type", "no value fits it")
        return expressions[0] if len(expressions) == 1 else f"({' | '.join(expressions)})"

    def _literals(self, schema: Schema) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        others = schema.keys() - {"const", "enum", "type", "$defs", "definitions"}
        if others:
            raise NotEnforceable(min(others), "it stands beside 'enum' or 'const'")
        if not isinstance(values, list):
            raise NotEnforceable("enum", "it must be a list")
        kinds = types_of(schema)
        fitting = [value for value in values if kinds is None or _is_of(value, kinds)]
        texts = [value for value in fitting if isinstance(value, str)]
        expressions = [self._syntax.one_of(texts)] if texts else []
        expressions += [self._syntax.literal(v) for v in fitting if not isinstance(v, str)]
        return self._any_of(expressions)

    def _typed(self, kind: str, schema: Schema, pointer: str, depth: int) -> str:
        match kind:
            case "null":
                return '"null"'
            case "boolean":
                return '("true" | "false")'
            case "integer" | "number":
                return self._syntax.number(kind, schema)
            case "string":
                return self._syntax.string(schema)
            case "array":
                return self._array(schema, pointer, depth)
            case _:
                return self._object(schema, pointer, depth)

    def _array(self, schema: Schema, pointer: str, depth: int) -> str:
        at_least = is_length(schema, "minItems", 0)
        at_most = is_length(schema, "maxItems", None)
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list):
            first, rest = rest, schema.get("additionalItems", True)
        items = [
            self._value(item, f"{pointer}/prefixItems/{i}", depth + 1)
            for i, item in enumerate(first)
        ][:at_most]
        other = None
        if rest is not False and (at_most is None or at_most > len(items)):
            other = self._value(rest, f"{pointer}/items", depth + 1)
        if at_least > (len(items) if other is None else at_most or at_least):
            raise NotEnforceable("minItems", "there can't be so many items")
        return self._syntax.array(items, other, at_least, at_most)

    def _object(self, schema: Schema, pointer: str, depth: int) -> str:
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise NotEnforceable("required", "it must be a list of names")
        others = schema.get("additionalProperties", True)
        properties = dict(schema.get("properties", {}))
        for name in required:
            properties.setdefault(name, others)
        if len(properties) > _MAX_PROPERTIES:
            raise NotEnforceable("properties", f"there are more than {_MAX_PROPERTIES}")
        for keyword in ("patternProperties", "maxProperties"):
            if keyword in schema:
                raise NotEnforceable(keyword, "the syntax of calls has no rule for it")
        members = {
            name: self._value(inner, f"{pointer}/properties/{name}", depth + 1)
            for name, inner in properties.items()
            if inner is not False or name in required
        }
        other = None
        if others is not False:
            other = self._value(others, f"{pointer}/additionalProperties", depth + 1)
        is_empty = schema.get("minProperties", 0) == 0
        return self._syntax.object(members, frozenset(required), other, can_be_empty=is_empty)


def _types_it_is_about(schema: Schema) -> list[str]:
    """Where a schema doesn't say: those that its keywords say something of, or all."""
    kinds = [
        kind
        for kind, keywords in _KEYWORDS_OF_TYPES.items()
        if not schema.keys().isdisjoint(keywords)
    ]
    return kinds or _ALL_TYPES


def _without(schema: Schema, keyword: str) -> Schema:
    return {key: value for key, value in schema.items() if key != keyword}


def _is_of(value: Any, kinds: list[str]) -> bool:
    kind = type_of_value(value)
    return kind in kinds or (kind == "integer" and "number" in kinds)
