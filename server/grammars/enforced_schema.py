"""JSON schemas → the part of them that a grammar enforces, which has to be all of it.

A keyword that can't be enforced is refused by its name and place, never dropped in silence:

    {"type": "array", "uniqueItems": true}
    → 400  response_format, at #/uniqueItems: 'uniqueItems' can't be enforced.

Annotations are dropped. Objects that name properties and don't mention `additionalProperties`
have no others, as OpenAI demands that they say: a model should not invent any. Where a schema is
made of several (`allOf`, or properties beside `anyOf`) that would forbid what another part asks
for, so there `additionalProperties` stays what JSON Schema says.
"""

from collections.abc import Mapping
from typing import Any

from bezel.engine.errors import InvalidRequest
from bezel.server.grammars.schema_algebra import NotEnforceable, are_disjoint, target_of

TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
FORMATS = (
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uuid",
)
# They tell how wide a number is stored, which JSON can't show.
_NUMBER_FORMATS = ("int32", "int64", "float", "double")

_SCHEMA_KEYWORDS = frozenset({"items", "additionalItems", "additionalProperties"})
_LIST_KEYWORDS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_MAP_KEYWORDS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_PLAIN_KEYWORDS = frozenset(
    {
        *("$ref", "type", "const", "enum", "required", "pattern", "format"),
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
_ANNOTATIONS = frozenset(
    {
        *("$schema", "$id", "id", "$comment", "title", "description", "default", "deprecated"),
        *("example", "examples", "readOnly", "writeOnly", "contentMediaType", "contentEncoding"),
        *("discriminator", "externalDocs", "xml", "strict"),
    }
)
# Whether a pattern can be enforced shows only when the grammar is compiled.
_STRICT_ONLY = frozenset({"pattern", "patternProperties"})
# Unsupported keywords, at the value that says nothing.
_EMPTY = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True}

_MAX_DEPTH = 48
_MAX_COMPARED = 100  # alternatives, each with each
_MAX_SCHEMAS = 20_000


def enforced_schema(schema: Any, param: str, *, is_strict: bool = True) -> Any:
    """The same schema without annotations; a bool if it is one.

    Not `is_strict`: what can't be enforced is left out.

    Raises:
        InvalidRequest: it isn't a schema, or a keyword can't be enforced; `param` is its field.
    """
    return _Reader(schema, param, is_strict).read(schema, "#", 0)


class _Reader:
    def __init__(self, root: Any, param: str, is_strict: bool) -> None:
        self._root, self._param, self._is_strict = root, param, is_strict
        self._combines = _combines(root)
        self._num_schemas = 0

    def read(self, schema: Any, pointer: str, depth: int) -> Any:
        self._num_schemas += 1
        if depth > _MAX_DEPTH or self._num_schemas > _MAX_SCHEMAS:
            raise self._problem(pointer, "the schema is nested too deeply or too large.")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise self._problem(pointer, "must be a JSON schema, which is an object or a boolean.")
        result: dict[str, Any] = {}
        for keyword, value in schema.items():
            place = f"{pointer}/{_escaped(keyword)}"
            if keyword in _STRICT_ONLY and not self._is_strict:
                continue
            if keyword in _MAP_KEYWORDS:
                if not isinstance(value, Mapping):
                    raise self._problem(place, "must be an object.")
                result[keyword] = {
                    name: self.read(inner, f"{place}/{_escaped(name)}", depth + 1)
                    for name, inner in value.items()
                }
            elif keyword in _LIST_KEYWORDS or (keyword == "items" and isinstance(value, list)):
                if not isinstance(value, list):
                    raise self._problem(place, "must be a list.")
                result[keyword] = [
                    self.read(inner, f"{place}/{i}", depth + 1) for i, inner in enumerate(value)
                ]
            elif keyword in _SCHEMA_KEYWORDS:
                result[keyword] = self.read(value, place, depth + 1)
            elif keyword in _PLAIN_KEYWORDS:
                if self._is_enforced(schema, keyword, value, place):
                    result[keyword] = value
            elif not self._is_annotation(keyword, value) and self._is_strict:
                raise self._problem(place, f"{keyword!r:.100} can't be enforced.")
        if "properties" in result and not self._combines and "minProperties" not in result:
            result.setdefault("additionalProperties", False)
        if "oneOf" in result and "anyOf" not in result:
            variants = schema["oneOf"]
            if self._is_strict and not self._are_exclusive(variants):
                message = "'oneOf' can't be enforced, a value might fit two of them; 'anyOf' can."
                raise self._problem(f"{pointer}/oneOf", message)
            result["anyOf"] = result.pop("oneOf")
        return _with_null(result) if schema.get("nullable") is True else result

    def _are_exclusive(self, variants: list[Any]) -> bool:
        """Whether no value fits two of them, so that one of them is any of them."""
        if len(variants) > _MAX_COMPARED:
            return False
        pairs = [(one, other) for i, one in enumerate(variants) for other in variants[:i]]
        return all(are_disjoint(one, other, self._resolved) for one, other in pairs)

    def _resolved(self, schema: Any) -> Any:
        """What a schema refers to; True, which anything fits, if that can't be told."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                return schema
            try:
                schema = target_of(self._root, str(schema["$ref"]))
            except NotEnforceable:
                break
        return True

    def _is_enforced(self, schema: Mapping[str, Any], keyword: str, value: Any, place: str) -> bool:
        """Whether a keyword that a grammar knows is to be kept, at this value."""
        if keyword == "type":
            names = value if isinstance(value, list) else [value]
            if not names or not all(isinstance(name, str) and name in TYPES for name in names):
                raise self._problem(place, f"{value!r:.100} isn't a type of JSON Schema.")
        elif keyword == "$ref":
            if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
                raise self._problem(place, "only references within the schema are supported.")
        elif keyword == "format":
            if value in _NUMBER_FORMATS:
                return False
            if value not in FORMATS:
                if self._is_strict:
                    raise self._problem(place, f"format {value!r:.100} can't be enforced.")
                return False
        elif keyword == "minProperties":
            return self._is_enforced_minimum(schema, value, place)
        return True

    def _is_enforced_minimum(self, schema: Mapping[str, Any], value: Any, place: str) -> bool:
        """Names that nobody lists may come twice, so a minimum of more than one means nothing."""
        if type(value) is not int or value < 0:
            raise self._problem(place, "must be an integer that isn't negative.")
        required = schema.get("required", [])
        if isinstance(required, list) and value <= len(required):
            return False
        if value > 1:
            if self._is_strict:
                raise self._problem(place, "'minProperties' above 1 can't be enforced.")
            return False
        return True

    def _is_annotation(self, keyword: str, value: Any) -> bool:
        if keyword == "nullable":
            return isinstance(value, bool)
        is_empty = keyword in _EMPTY and _EMPTY[keyword] is value
        return keyword in _ANNOTATIONS or keyword.startswith("x-") or is_empty

    def _problem(self, pointer: str, message: str) -> InvalidRequest:
        return InvalidRequest(f"{self._param}, at {pointer:.300}: {message}", self._param)


def _combines(schema: Any) -> bool:
    """Whether objects are put together of several schemas, anywhere in it."""
    pending = [(schema, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, Mapping):
            several = value.get("allOf")
            if isinstance(several, list) and len(several) > 1:
                return True
            if "properties" in value and not value.keys().isdisjoint(
                {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"}
            ):
                return True
            pending += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            pending += [(inner, depth + 1) for inner in value]
    return False


def _with_null(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's `nullable`, in JSON Schema's words."""
    result = dict(schema)
    if "type" in result:
        kinds = result["type"] if isinstance(result["type"], list) else [result["type"]]
        result["type"] = list(dict.fromkeys([*kinds, "null"]))
    if isinstance(result.get("enum"), list):
        result["enum"] = [*result["enum"], *([] if None in result["enum"] else [None])]
    if "const" in result:
        result["enum"] = [result.pop("const"), None]
    for keyword in ("anyOf", "oneOf"):
        if keyword in result:
            result[keyword] = [*result[keyword], {"type": "null"}]
    if "$ref" in result or "allOf" in result:
        return {"anyOf": [result, {"type": "null"}]}
    return result


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
