"""JSON schemas put together and told apart, as far as their keywords show it.

joined({"type": "object", "required": ["a"]}, {"required": ["b"]})  → both at once
are_disjoint({"const": 1}, {"type": "string"})                      → no value fits both
"""

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any]

_LOWER_BOUNDS = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"})
_UPPER_BOUNDS = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"})
_MAX_DEPTH = 8


class NotEnforceable(Exception):
    """`keyword` says something that can't be said in a grammar."""

    def __init__(self, keyword: str, reason: str) -> None:
        super().__init__(f"'{keyword}' can't be enforced: {reason}.")


def target_of(root: Any, reference: str) -> Any:
    """What `#/…` refers to.

    Raises:
        NotEnforceable: there is no such part.
    """
    found = root
    for step in unquote(reference).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise NotEnforceable("$ref", f"{reference[:100]!r} isn't there")
    return found


def joined(first: Any, second: Any) -> Any:
    """A schema for what fits both.

    Raises:
        NotEnforceable: it can't be told by one schema.
    """
    if first is True or second is True:
        return second if first is True else first
    if first is False or second is False:
        return False
    result = dict(first)
    for keyword, value in second.items():
        result[keyword] = _both(keyword, result[keyword], value) if keyword in result else value
    _check_other_names(first, second)
    _check_other_names(second, first)
    return result


def _both(keyword: str, first: Any, second: Any) -> Any:
    if first == second:
        return first
    if keyword in _LOWER_BOUNDS:
        return max(first, second)
    if keyword in _UPPER_BOUNDS:
        return min(first, second)
    if keyword == "type":
        return _common_types(_as_list(first), _as_list(second))
    if keyword == "required":
        return list(dict.fromkeys([*first, *second]))
    if keyword == "enum":
        return [value for value in first if _text(value) in map(_text, second)]
    if keyword == "properties":
        shared = {name: {"allOf": [first[name], second[name]]} for name in first if name in second}
        return {**first, **second, **shared}
    if keyword in ("items", "additionalProperties"):
        return {"allOf": [first, second]}
    if keyword in ("$defs", "definitions"):
        return first
    raise NotEnforceable(keyword, "several schemas at once say different things of it")


def _check_other_names(first: Schema, second: Schema) -> None:
    """Properties that only the second names are among the other ones of the first."""
    others = second.get("properties", {}).keys() - first.get("properties", {}).keys()
    if others and first.get("additionalProperties", True) is not True:
        raise NotEnforceable("additionalProperties", "another schema has properties of its own")


def types_of(schema: Schema) -> list[str] | None:
    """The types it names, without repetition; None if it names none."""
    return list(dict.fromkeys(_as_list(schema["type"]))) if "type" in schema else None


def are_disjoint(first: Any, second: Any, resolved: Callable[[Any], Any], depth: int = 0) -> bool:
    """Whether no value can fit both; False if that doesn't show. `resolved` follows references."""
    first, second = resolved(first), resolved(second)
    if first is False or second is False:
        return True
    if not isinstance(first, dict) or not isinstance(second, dict) or depth > _MAX_DEPTH:
        return False
    for one, other in ((first, second), (second, first)):
        for keyword in ("anyOf", "oneOf"):
            if keyword in one:
                return all(are_disjoint(v, other, resolved, depth + 1) for v in one[keyword])
    kinds = _kinds(first), _kinds(second)
    if None not in kinds and not _common_types(*(kind or [] for kind in kinds)):
        return True
    values = _values(first), _values(second)
    if values[0] is not None and values[1] is not None:
        return set(map(_text, values[0])).isdisjoint(map(_text, values[1]))
    if kinds != (["object"], ["object"]):
        return False
    shared = set(first.get("required", ())) & set(second.get("required", ()))
    return any(
        are_disjoint(
            first.get("properties", {}).get(name, True),
            second.get("properties", {}).get(name, True),
            resolved,
            depth + 1,
        )
        for name in shared
    )


def type_of_value(value: Any) -> str:
    """JSON Schema's name of a JSON value's type."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")


def _values(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    enum = schema.get("enum")
    return enum if isinstance(enum, list) else None


def _kinds(schema: Schema) -> list[str] | None:
    if (types := types_of(schema)) is not None:
        return types
    values = _values(schema)
    return None if values is None else list(dict.fromkeys(map(type_of_value, values)))


def _common_types(first: list[str], second: list[str]) -> list[str]:
    common = [kind for kind in first if kind in second]
    if "integer" not in common and {"integer", "number"} <= {*first, *second}:
        common.append("integer")
    return common


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
