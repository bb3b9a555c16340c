"""Seeded damage: to bytes, and to JSON that still is JSON."""

import json
from random import Random
from typing import Any

# What parsers of HTTP, JSON, UTF-8 and event streams have stumbled over.
TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b'"', b"\\", b"{", b"}", b"[", b"]"),
    *(b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8"),
    *(b"\\ud800", b"\\u0000", b"NaN", b"Infinity", b"-0", b"1e999", b"9" * 40, b"0x10", b"null"),
    *(b"true", b"[" * 200, b'{"a":' * 200, b"HTTP/1.1", b"Content-Length: 5\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"0\r\n\r\n", b"data: "),
    *(b"data:[DONE]\n\n", b"event: error\n", b"\x16\x03\x01\x02\x00", b"Upgrade: websocket\r\n"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e300),
    *(float("nan"), float("inf"), "", "a", "\0", "\ud800", "\u2028", "1", "a" * 10_000),
    *([], [[]], [None], {}, {"": None}, {"a": {"b": []}}, [0] * 1000),
]


def damage(random: Random, data: bytes) -> bytes:
    """With one to four bytes or pieces changed, taken out, doubled, moved or put in."""
    for _ in range(random.randint(1, 4)):
        start = random.randrange(len(data) + 1)
        end = min(len(data), start + random.choice((1, 1, 2, 8, 64)))
        piece = data[start:end]
        match random.randrange(6):
            case 0:
                piece = bytes(random.randrange(256) for _ in piece)
            case 1:
                piece = b""
            case 2:
                piece += piece
            case 3:
                piece = random.choice(TOKENS)
            case 4:
                piece += random.choice(TOKENS)
            case 5:
                data, start, end = data[:start] + data[end:], 0, 0
        data = data[:start] + piece + data[end:]
    return data


def damage_json(random: Random, value: Any) -> Any:
    """With one value, anywhere in it, replaced by another, taken out, or under another name."""
    places = list(_places(value))
    if not places:
        return random.choice(VALUES)
    parent, key = random.choice(places)
    chosen = random.randrange(4)
    if isinstance(parent, dict) and chosen == 0:
        del parent[key]
    elif isinstance(parent, dict) and chosen == 1:
        parent[random.choice(("", "\ud800", "a", "stream", "n", "tools"))] = parent.pop(key)
    else:
        parent[key] = random.choice(VALUES)
    return value


def dumps(value: Any) -> bytes:
    """Half surrogate pairs escaped, NaN as Python and many others spell it."""
    return json.dumps(value).encode("ascii")


def _places(value: Any) -> Any:
    """Every object and array in it, with each key that it has."""
    keys = value if isinstance(value, dict) else range(len(value)) if _is_list(value) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
