"""Patterns against Python's `re.search`, formats against examples."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.server.grammars.string_patterns import format_regex, search_regex

PATTERNS = [
    "a",
    "^a",
    "a$",
    "^a$",
    "^ab|c$",
    "a|^b",
    "(a|b)c",
    "^(a|b)+$",
    "[|]",
    "[a|b]$",
    r"\|",
    r"a\$",
    r"a\\$",
    "",
    "^$",
    "^|c",
    "[^a]$",
    r"[\]|a]c",
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PATTERNS), st.text(st.sampled_from("abc|:$\\\n]"), max_size=5))
def test_a_pattern_is_searched_for(pattern: str, text: str) -> None:
    # Python's $ also matches before a last line end; JSON Schema's doesn't.
    wanted = re.search(re.sub(r"(?<!\\)((?:\\\\)*)\$", r"\1\\Z", pattern), text)
    assert (re.fullmatch(search_regex(pattern), text) is not None) == (wanted is not None)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", "2024-02-28 1999-12-31", "2024-02-30 2024-13-01 24-01-01 2024-1-1"),
        ("time", "23:59:59Z 00:00:00.123+02:00", "24:00:00Z 12:00Z 12:00:00 12:60:00Z"),
        ("date-time", "2024-02-28T23:59:59Z", "2024-02-28 2024-02-28T24:00:00Z"),
        ("duration", "P1Y2M3D P1W PT5M P1DT2H PT1H30M", "P PT 1D P1DT P1W2D P1H"),
        ("email", "a.b+c@example.com", "a@b @b.com a@b..com a@c.com@d a@"),
        ("hostname", "example.com localhost a-b.c", "-a.com a-.com a..b"),
        ("ipv4", "127.0.0.1 255.255.255.0", "256.0.0.1 1.2.3 01.2.3.4 1.2.3.4.5"),
        ("ipv6", "::1 :: 1:2:3:4:5:6:7:8 fe80::1:2 1::", "1:2 1::2::3 12345:: 1:2:3:4:5:6:7 :1"),
        ("uri", "https://example.com/a?b=c#d ftp://x", "example.com /a http:// 1http://x"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567e89b12d3a456426614174000 x"),
    ],
)
def test_formats(name: str, good: str, bad: str) -> None:
    for text in good.split():
        assert re.fullmatch(format_regex(name), text), text
    for text in bad.split(" "):
        assert not re.fullmatch(format_regex(name), text), text
