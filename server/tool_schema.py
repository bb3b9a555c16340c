"""JSON schemas of tools → the few keywords that Gemma's templates show to the model.

Templates know `type` (one), `description`, `enum` of strings, `properties`, `required`, `items` and
`nullable`; of anything else they make nonsense or nothing. So references are followed, and
alternatives become one schema:

    {"anyOf": [{"type": "integer"}, {"type": "null"}]}  → {"type": "integer", "nullable": true}
    {"type": ["integer", "string"]}                     → an integer, described as "or: string"
    {"oneOf": [objects…]}                               → one object with the properties of all

What the model sees is a help and not the law: where arguments must fit, the grammar is made of the
schema as it came.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from bezel.engine.errors import InvalidRequest

# References can multiply a schema, and the template recurses with its depth.
_MAX_SCHEMAS = 10_000
_MAX_DEPTH = 32

_UNIONS = ("anyOf", "oneOf")
_References = frozenset[str]


class SchemaReader:
    """Reads the schemas of one request; together they may not grow without bounds."""

    def __init__(self) -> None:
        self._num_left = _MAX_SCHEMAS

    def read(self, schema: Any, param: str) -> dict[str, Any]:
        """The schema of a function's parameters, always an object's.

        Raises:
            InvalidRequest: it isn't a schema, refers to what isn't there, or is too large.
        """
        if not isinstance(schema, Mapping):
            raise InvalidRequest(f"{param} must be a JSON schema.", param)
        shown = self._shown(schema, _Place(schema, param))
        return {**_properties_of(shown), "type": "object"}

    def _shown(self, schema: Any, place: "_Place") -> dict[str, Any]:
        self._num_left -= 1
        if self._num_left < 0:
            raise place.problem(f"tools may have no more than {_MAX_SCHEMAS} schemas.")
        if place.depth > _MAX_DEPTH:
            raise place.problem(f"schemas may not be nested more than {_MAX_DEPTH} deep.")
        variants = self._variants(schema, place)
        shapes = [self._shape(variant, inner) for variant, inner in variants]
        solid = [shape for shape in shapes if shape["type"] != "null"]
        if not solid:
            return {"type": "null"}
        shown = _joined(solid)
        if len(solid) < len(shapes):
            shown["nullable"] = True
        return shown

    def _variants(self, schema: Any, place: "_Place") -> list[tuple[dict[str, Any], "_Place"]]:
        """The alternatives of a schema, with what is said of all of them in each."""
        plain, place = self._expanded(schema, place)
        union = next((keyword for keyword in _UNIONS if keyword in plain), None)
        if union is not None:
            parts = _list_of(plain, union, place)
            common = {key: value for key, value in plain.items() if key != union}
        elif isinstance(plain.get("type"), list):
            parts = [{"type": kind} for kind in plain["type"]]
            common = {key: value for key, value in plain.items() if key != "type"}
        else:
            return [(plain, place)]
        variants = []
        for i, part in enumerate(parts):
            self._num_left -= 1
            inner_place = place.inner(f"{union}/{i}" if union else "type")
            inner, inner_place = self._expanded(part, inner_place)
            variants += self._variants(_merged(common, inner), inner_place)
        return variants

    def _expanded(self, schema: Any, place: "_Place") -> tuple[dict[str, Any], "_Place"]:
        """Without `$ref` and `allOf` at its top."""
        if place.depth > _MAX_DEPTH or self._num_left < 0:
            raise place.problem("the schema is too large.")
        if isinstance(schema, bool):
            return {}, place
        if not isinstance(schema, Mapping):
            raise place.problem("must be a JSON schema.")
        plain = dict(schema)
        if (reference := plain.pop("$ref", None)) is not None:
            if reference in place.references:  # it contains itself: shown once
                return {"type": "object", **_without_structure(plain)}, place
            target, place = place.target(reference)
            target, place = self._expanded(target, place)
            plain = _merged(plain, target)
        if "allOf" in plain:
            parts = _list_of(plain, "allOf", place)
            del plain["allOf"]
            whole = place
            for i, part in enumerate(parts):
                self._num_left -= 1
                inner, inner_place = self._expanded(part, place.inner(f"allOf/{i}"))
                whole = whole.knowing(inner_place)
                plain = _merged(plain, inner)
            place = whole
        return plain, place

    def _shape(self, schema: dict[str, Any], place: "_Place") -> dict[str, Any]:
        """What is shown of a schema without alternatives."""
        values = _values_of(schema, place)
        kind = _type_of(schema, values, place)
        shape: dict[str, Any] = {"type": kind}
        if isinstance(schema.get("description"), str):
            shape["description"] = schema["description"]
        if schema.get("nullable") is True or (None in values and kind != "null"):
            shape["nullable"] = True
        if kind == "object":
            properties = schema.get("properties", {})
            if not isinstance(properties, Mapping):
                raise place.inner("properties").problem("must be an object.")
            shape["properties"] = {
                name: self._shown(item, place.inner(f"properties/{name}"))
                for name, item in properties.items()
            }
            if required := _list_of(schema, "required", place):
                shape["required"] = [name for name in required if isinstance(name, str)]
        elif kind == "array":
            if items := _items_of(schema):
                shape["items"] = self._shown(items, place.inner("items"))
        elif kind == "string" and values:
            shape["enum"] = [value for value in values if isinstance(value, str)]
        elif kind != "null" and values:
            texts = ", ".join(json.dumps(value, ensure_ascii=False) for value in values)
            _note(shape, f"one of: {texts}")
        return shape


class _Place:
    """Where in the parameters a schema stands, and the references that led there."""

    def __init__(
        self,
        root: Mapping[str, Any],
        param: str,
        pointer: str = "#",
        references: _References = frozenset(),
        depth: int = 0,
    ) -> None:
        self._root, self._param, self._pointer = root, param, pointer
        self.references, self.depth = references, depth

    def inner(self, step: str) -> "_Place":
        pointer = f"{self._pointer}/{step}"
        return _Place(self._root, self._param, pointer, self.references, self.depth + 1)

    def knowing(self, other: "_Place") -> "_Place":
        """Here, with the references of both."""
        references = self.references | other.references
        return _Place(self._root, self._param, self._pointer, references, self.depth)

    def problem(self, message: str) -> InvalidRequest:
        return InvalidRequest(f"{self._param}, at {self._pointer:.200}: {message}", self._param)

    def target(self, reference: Any) -> tuple[Any, "_Place"]:
        """What a `$ref` means: always a part of the same schema.

        Raises:
            InvalidRequest: there is no such part.
        """
        here = self.inner("$ref")
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise here.problem("only references within the schema are supported.")
        found: Any = self._root
        for step in unquote(reference[1:]).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise here.problem(f"{reference!r:.200} isn't there.")
        references = self.references | {reference}
        return found, _Place(self._root, self._param, self._pointer, references, self.depth + 1)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both schemas at once; where they disagree, the first counts."""
    merged = {**second, **first}
    both = [schema for schema in (second, first) if isinstance(schema.get("properties"), Mapping)]
    if len(both) == 2:
        merged["properties"] = {**both[0]["properties"], **both[1]["properties"]}
    required = [second.get("required"), first.get("required")]
    if all(isinstance(names, list) for names in required):
        merged["required"] = list(dict.fromkeys([*(required[0] or []), *(required[1] or [])]))
    return merged


def _joined(shapes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One shape for all alternatives."""
    first = dict(shapes[0])
    if len(shapes) == 1:
        return first
    if any(shape.get("nullable") for shape in shapes):
        first["nullable"] = True
    alike = [shape for shape in shapes if shape["type"] == first["type"]]
    if first["type"] == "object":
        first |= _joined_objects(alike)
    elif first["type"] == "string" and "enum" in first:
        enums = [shape.get("enum") for shape in alike]
        if None in enums:
            del first["enum"]
        else:
            first["enum"] = list(dict.fromkeys(v for enum in enums for v in enum or ()))
    others = dict.fromkeys(shape["type"] for shape in shapes if shape["type"] != first["type"])
    if others:
        _note(first, f"or: {', '.join(others)}")
    return first


def _joined_objects(shapes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    alternatives: dict[str, list[dict[str, Any]]] = {}
    for shape in shapes:
        for name, item in shape["properties"].items():
            alternatives.setdefault(name, []).append(item)
    required = [shape.get("required", []) for shape in shapes]
    return {
        "properties": {name: _joined(items) for name, items in alternatives.items()},
        "required": [name for name in required[0] if all(name in names for names in required)],
    }


def _properties_of(shape: dict[str, Any]) -> dict[str, Any]:
    return {"properties": {}} | {k: v for k, v in shape.items() if k in ("properties", "required")}


def _without_structure(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("description", "nullable") if key in schema}


def _note(shape: dict[str, Any], note: str) -> None:
    described = shape.get("description")
    shape["description"] = f"{described} ({note})" if described else note


def _values_of(schema: Mapping[str, Any], place: _Place) -> list[Any]:
    if "const" in schema:
        return [schema["const"]]
    return _list_of(schema, "enum", place)


def _list_of(schema: Mapping[str, Any], keyword: str, place: _Place) -> list[Any]:
    value = schema.get(keyword, [])
    if not isinstance(value, list):
        raise place.inner(keyword).problem("must be a list.")
    return value


def _type_of(schema: Mapping[str, Any], values: list[Any], place: _Place) -> str:
    kind = schema.get("type")
    if isinstance(kind, str):
        return kind.lower()
    if kind is not None:
        raise place.inner("type").problem("must be a string or a list of strings.")
    if values:
        return _type_of_value(next((v for v in values if v is not None), None))
    if "properties" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else "any"


def _type_of_value(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}
    return "null" if value is None else names.get(type(value), "object")


def _items_of(schema: Mapping[str, Any]) -> Any:
    """The schema of all items; of a tuple's, the alternatives."""
    fixed = schema.get("prefixItems") or schema.get("items")
    return {"anyOf": fixed} if isinstance(fixed, list) else fixed
