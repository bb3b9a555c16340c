"""The arguments of Gemma's calls → JSON, piece by piece.

    k:<|"|>v<|"|>,n:42,o:{a:[1,null]}}   ─▶   {"k":"v","n":42,"o":{"a":[1,null]}}

A state machine over characters; each state is a method that takes the next one. Strings are given
out as they come. Keys, numbers and words are withheld until they are complete, for 10 may become
108.5, and tru become true or "trust".

    ╭──────────────── , ────────────────╮
    ▼                                   │
    key ─ : ─▶ value ─ , } ] ─▶ JSON    after
    │            ├─ <|"|> ─▶ string ──▶ │
    │            ├─ " or ' ─▶ plain ──▶ │
    │            ╰─ { or [ ─▶ one level deeper, and back when it closes
    ╰─ <|"|>, " or ' ─▶ quoted key

Whatever comes, the pieces are the beginning of a JSON object, and after `finish` they are one.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

# Takes the place of the quote token among characters; no single character equals it.
_QUOTE = '<|"|>'
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORDS = {
    **{"true": "true", "false": "false", "null": "null"},
    **{"True": "true", "False": "false", "None": "null"},
}
_UNESCAPED_QUOTE = re.compile(r'((?:^|[^\\])(?:\\\\)*)"')
_to_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(slots=True)
class _Level:
    """An object or array that is open: what ends it, and what that is in JSON."""

    closer: str
    json_closer: str
    is_empty: bool = True


class ArgumentsReader:
    """Reads what follows the `opener` of arguments, a brace or a parenthesis, up to its closer.

    In parentheses "=" may stand between key and value too.
    """

    def __init__(self, opener: str = "{") -> None:
        self._separators = ":" if opener == "{" else ":="
        self._levels = [_Level("}" if opener == "{" else ")", "}")]
        self._json = ["{"]
        self._state: Callable[[str], None] = self._key
        # Characters of the key or value that isn't complete.
        self._chars: list[str] = []
        self._plain_quote = ""
        self._is_plain_key = False
        self._is_escaped = False
        self._in_string = False

    @property
    def is_complete(self) -> bool:
        """Whether the arguments have been closed."""
        return not self._levels

    def read(self, text: str, start: int = 0) -> int:
        """Further text, from `start` on; returns where the arguments ended, or its length."""
        position = start
        while position < len(text) and self._levels:
            if self._in_string:
                self._json.append(_to_json(text[position:])[1:-1])
                return len(text)
            self._state(text[position])
            position += 1
        return position

    def quote(self) -> None:
        """The quote token."""
        if self._in_string:
            self._in_string = False
            self._json.append('"')
        elif self._levels:
            self._state(_QUOTE)

    def finish(self) -> None:
        """Close what is open."""
        if self._in_string:
            self.quote()
        if self._state == self._plain:
            self._end_plain()
        if self._levels:
            self._close(self._levels[0])

    def take(self) -> str:
        """The JSON that is new since the last time."""
        taken = "".join(self._json)
        self._json.clear()
        return taken

    def _key(self, char: str) -> None:
        if char in self._separators:
            self._end_key()
        elif char == ",":
            self._end_item()
        elif char == _QUOTE:
            if not self._chars:  # after a word it is a stray one
                self._state = self._quoted_key
        elif level := self._level_closed_by(char):
            self._close(level)
        elif self._chars:
            self._chars.append(char)
        elif char == "{":
            self._levels.append(_Level("}", "", self._levels[-1].is_empty))
        elif char in "\"'":
            self._begin_plain(char, is_key=True)
        elif not char.isspace():
            self._chars.append(char)

    def _quoted_key(self, char: str) -> None:
        if char == _QUOTE:
            self._state = self._after_key
        else:
            self._chars.append(char)

    def _after_key(self, char: str) -> None:
        if char in self._separators:
            self._end_key()
        elif char == ",":
            self._end_item()
        elif level := self._level_closed_by(char):
            self._close(level)
        elif not char.isspace():  # the separator is missing
            self._end_key()
            self._value(char)

    def _value(self, char: str) -> None:
        if char == ",":
            self._end_item()
        elif level := self._level_closed_by(char):
            self._close(level)
        elif char == _QUOTE and self._chars:  # that of the beginning is missing
            self._add_value(_to_json(self._take_text().rstrip()))
        elif char == _QUOTE:
            self._add_value('"')
            self._in_string = True
        elif self._chars:
            self._chars.append(char)
        elif char in "{[":
            self._open(char)
        elif char in "\"'":
            self._begin_plain(char, is_key=False)
        elif not char.isspace():
            self._chars.append(char)

    def _plain(self, char: str) -> None:
        """In a string between ordinary quotes, where a backslash takes the next one's meaning."""
        if char == _QUOTE or (char == self._plain_quote and not self._is_escaped):
            self._end_plain()
        else:
            self._chars.append(char)
            self._is_escaped = char == "\\" and not self._is_escaped

    def _after(self, char: str) -> None:
        if char == ",":
            self._begin_item()
        elif level := self._level_closed_by(char):
            self._close(level)
        elif not char.isspace() and char not in "}])":  # the comma is missing
            self._begin_item()
            self._state(char)

    def _begin_item(self) -> None:
        self._state = self._value if self._is_in_array() else self._key

    def _end_item(self) -> None:
        """Complete the key or value that has begun, if one has."""
        if self._state == self._value:
            if self._chars:
                self._add_value(_word(self._take_text().rstrip()))
            elif not self._is_in_array():
                self._add_value("null")
        elif self._chars or self._state == self._after_key:
            self._end_key()
            self._add_value("null")
        self._begin_item()

    def _end_key(self) -> None:
        self._add_comma()
        self._json.append(_to_json(self._take_text().rstrip()) + ":")
        self._state = self._value

    def _add_value(self, value: str) -> None:
        if self._is_in_array():
            self._add_comma()
        self._json.append(value)
        self._state = self._after

    def _take_text(self) -> str:
        text = "".join(self._chars)
        self._chars.clear()
        return text

    def _add_comma(self) -> None:
        if not self._levels[-1].is_empty:
            self._json.append(",")
        self._levels[-1].is_empty = False

    def _is_in_array(self) -> bool:
        return self._levels[-1].closer == "]"

    def _open(self, char: str) -> None:
        self._add_value(char)
        closer = "}" if char == "{" else "]"
        self._levels.append(_Level(closer, closer))
        self._begin_item()

    def _level_closed_by(self, char: str) -> _Level | None:
        if char not in "}])":
            return None
        return next((level for level in reversed(self._levels) if level.closer == char), None)

    def _close(self, last: _Level) -> None:
        """Close all levels down to `last`."""
        if self._state != self._after:
            self._end_item()
        while True:
            level = self._levels.pop()
            self._json.append(level.json_closer)
            if not level.json_closer:  # a doubled brace: the items were those of the level below
                self._levels[-1].is_empty = level.is_empty
            if level is last:
                break
        self._state = self._after

    def _begin_plain(self, quote: str, is_key: bool) -> None:
        self._plain_quote = quote
        self._is_plain_key = is_key
        self._is_escaped = False
        self._state = self._plain

    def _end_plain(self) -> None:
        text = _unescaped(self._take_text(), self._plain_quote)
        if self._is_plain_key:
            self._chars.append(text)
            self._state = self._after_key
        else:
            self._add_value(_to_json(text))


def _word(text: str) -> str:
    """A value without quotes as JSON."""
    if _NUMBER.fullmatch(text):
        return text
    return _WORDS.get(text) or _to_json(text)


def _unescaped(text: str, quote: str) -> str:
    """What a string between ordinary quotes says; as it is where its escapes are wrong."""
    source = text
    if quote == "'":
        source = _UNESCAPED_QUOTE.sub(r'\1\\"', text.replace("\\'", "'"))
    try:
        value = json.loads(f'"{source}"', strict=False)
        value.encode()  # half of a surrogate pair can be spelled, but not sent
    except ValueError:
        return text
    return str(value)
