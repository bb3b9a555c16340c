"""Values in the syntax of Gemma's calls, as Lark.

    {city:<|"|>Paris<|"|>,days:3,tags:[<|"|>a<|"|>,null]}

`<|"|>` is one token, which no text can contain. Numbers are JSON's.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance import regex_to_lark

from bezel.server.grammars.schema_algebra import NotEnforceable, Schema
from bezel.server.grammars.string_patterns import format_regex, search_regex

_NOT_IN_NAMES = r"\s:,{}\[\]<>|\"'\\"
_BARE_NAME = re.compile(rf"[^{_NOT_IN_NAMES}]+")
_NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_NUMBER_STYLE = {"whitespace_flexible": False}


class CallSyntax:
    """Expressions for values, and the rules they are made of."""

    def __init__(self, quote: int) -> None:
        """`quote` is the token that strings stand between."""
        self._quote = f"<[{quote}]>"
        self._rules: list[str] = []
        self._names: dict[str, str] = {}
        self._has_any = False
        self._num_names = 0

    @property
    def num_rules(self) -> int:
        return len(self._rules)

    def rules(self) -> list[str]:
        """All that the expressions refer to but `TEXT`, a terminal for any text."""
        if not self._has_any:
            return list(self._rules)
        text = f"{self._quote} TEXT {self._quote}"
        return [
            *self._rules,
            f'any: {text} | any_number | "true" | "false" | "null" | any_array | any_object',
            f"any_number: {_number({'type': 'number'})}",
            'any_array: "[" (any ("," any)*)? "]"',
            'any_object: "{" (any_member ("," any_member)*)? "}"',
            f'any_member: (ANY_NAME | {text}) ":" any',
            f"ANY_NAME: /[^{_NOT_IN_NAMES}]+/",
        ]

    def new_name(self, kind: str) -> str:
        self._num_names += 1
        return f"{kind}_{self._num_names}"

    def define(self, name: str, body: str) -> None:
        self._rules.append(f"{name}: {body}")

    def _named(self, kind: str, body: str) -> str:
        """A rule or terminal of this body; the same one for the same body."""
        if body not in self._names:
            self._names[body] = self.new_name(kind)
            self.define(self._names[body], body)
        return self._names[body]

    def any_value(self) -> str:
        self._has_any = True
        return "any"

    def any_object(self) -> str:
        self._has_any = True
        return "any_object"

    def one_of(self, values: list[str]) -> str:
        """One of some strings, which may be thousands."""
        text = self._named("STRING", " | ".join(json.dumps(value) for value in values))
        return f"{self._quote} {text} {self._quote}"

    def literal(self, value: Any) -> str:
        """Exactly this value; of an object the members in the order that templates show."""
        if isinstance(value, str):
            return f"{self._quote} {json.dumps(value)} {self._quote}"
        if isinstance(value, list):
            return _sequence("[", [self.literal(item) for item in value], "]")
        if isinstance(value, dict):
            names = sorted(value, key=str.lower)
            members = [f"{self._name(name)} {self.literal(value[name])}" for name in names]
            return _sequence("{", members, "}")
        return json.dumps(json.dumps(value))

    def number(self, kind: str, schema: Schema) -> str:
        """`kind` is "integer" or "number"; JSON's rules are llguidance's own."""
        bounds = {key: schema[key] for key in _NUMBER_KEYWORDS if key in schema}
        return self._named("number", _number({"type": kind, **bounds}))

    def string(self, schema: Schema) -> str:
        parts = []
        if "pattern" in schema:
            pattern = schema["pattern"]
            if not isinstance(pattern, str):
                raise NotEnforceable("pattern", "it must be a string")
            # \d and \w are ASCII's in JSON Schema.
            parts.append(f"/{regex_to_lark(search_regex(pattern), 'dw')}/")
        if "format" in schema:
            parts.append(f"/{regex_to_lark(format_regex(schema['format']), '')}/")
        shortest, longest = is_length(schema, "minLength", 0), is_length(schema, "maxLength", None)
        if shortest or longest is not None:
            parts.append(f"/(?s:.{{{shortest},{'' if longest is None else longest}}})/")
        text = self._named("STRING", " & ".join(parts)) if parts else "TEXT"
        return f"{self._quote} {text} {self._quote}"

    def array(self, items: list[str], other: str | None, at_least: int, at_most: int | None) -> str:
        """The first `items`, then any number of `other`, in all `at_least` to `at_most`."""
        tail = ""
        if other is not None:
            low = max(0, at_least - len(items))
            high = "" if at_most is None else at_most - len(items)
            tail = f'("," {other}){{{low},{high}}}'
            if not items:
                # The first one has no comma.
                more = "" if at_most is None else at_most - 1
                tail = f'{other} ("," {other}){{{max(0, low - 1)},{more}}}'
                tail = tail if at_least else f"({tail})?"
        for i in range(len(items) - 1, -1, -1):
            comma = '"," ' if i else ""
            tail = f"{comma}{items[i]} {tail}"
            tail = tail if i < at_least else f"({tail})?"
        return self._named("array", f'"[" {tail} "]"')

    def object(
        self,
        members: Mapping[str, str],
        required: frozenset[str],
        other: str | None,
        *,
        can_be_empty: bool,
    ) -> str:
        """`members` by name, those `required` and any others, and members of other names."""
        if not members and other is None:
            if not can_be_empty:
                raise NotEnforceable("minProperties", "it has no properties")
            return '"{}"'
        names = sorted(members, key=lambda name: name not in required)
        end = '"}"'
        if required:
            end += f" %if is_ones([0:{len(required)}])"
        first, more = self.new_name("first"), self.new_name("more")
        begun, going_on = [end] if can_be_empty else [], [end]
        for bit, name in enumerate(names):
            member = f"{self._name(name)} {members[name]} {more}::set_bit({bit})"
            begun.append(member)
            going_on.append(f'"," {member} %if bit_clear({bit})')
        if other is not None:
            member = f"{self._other_name(names)} {other} {more}::_"
            begun.append(member)
            going_on.append(f'"," {member}')
        self.define(f"{first}::_", "\n  | ".join(begun))
        self.define(f"{more}::_", "\n  | ".join(going_on))
        return self._named("object", f'"{{" {first}::0x0')

    def _name(self, name: str) -> str:
        """A member's name and the colon; quoted if it would be misread bare."""
        if _BARE_NAME.fullmatch(name):
            return json.dumps(f"{name}:")
        return f'{self.literal(name)} ":"'

    def _other_name(self, names: list[str]) -> str:
        """Any name but these, which would come twice."""
        if not names:
            bare, quoted = self._named("NAME", f"/[^{_NOT_IN_NAMES}]+/"), "TEXT"
        else:
            taken = " | ".join(json.dumps(name) for name in names)
            bare = self._named("NAME", f"/[^{_NOT_IN_NAMES}]+/ & ~({taken})")
            quoted = self._named("NAME", f"/(?s:.*)/ & ~({taken})")
        return f'({bare} | {self._quote} {quoted} {self._quote}) ":"'


def is_length(schema: Schema, keyword: str, default: Any) -> Any:
    """The value of a keyword that counts.

    Raises:
        NotEnforceable: it is no natural number.
    """
    value = schema.get(keyword, default)
    if value is not default and (type(value) is not int or value < 0):
        raise NotEnforceable(keyword, "it must be an integer that isn't negative")
    return value


def _number(schema: Schema) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _NUMBER_STYLE})


def _sequence(opening: str, items: list[str], closing: str) -> str:
    inner = ' "," '.join(items)
    return f'"{opening}" {inner} "{closing}"'
