"""Patterns and formats of JSON Schema as regular expressions that match a whole string.

A `pattern` may match anywhere, llguidance's expressions match from end to end:

    "^ab|c$"   →   (?:ab(?s:.*))|(?:(?s:.*)c)
"""

_ANY = "(?s:.*)"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DATE = (
    "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_OFFSET = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = rf"(?:[01][0-9]|2[0-3])(?::[0-5][0-9]){{2}}(?:\.[0-9]{{1,9}})?{_OFFSET}"
_HEX = "[0-9a-fA-F]{1,4}"
_URI_CHAR = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_URI_TAIL = f"(?:{_URI_CHAR}|[/?])*"
_DAYS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_HOURS = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"


def _ipv6() -> str:
    """All eight groups, or `::` in place of one or more of them."""
    forms = [rf"{_HEX}(?::{_HEX}){{7}}"]
    for before in range(8):
        head = rf"{_HEX}(?::{_HEX}){{{before - 1}}}" if before else ""
        after = 7 - before
        tail = rf"(?:{_HEX}(?::{_HEX}){{0,{after - 1}}})?" if after else ""
        forms.append(f"{head}::{tail}")
    return "|".join(forms)


# Subsets of what the formats allow: no 29 February, no quoted local parts, no user in a URI.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"(?:{_DATE})T{_TIME}",
    "duration": f"P(?:[0-9]+W|{_DAYS}(?:{_HOURS})?|{_HOURS})",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_LABEL}(?:\.{_LABEL})+",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,3}}",
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "uri": (
        rf"[A-Za-z][A-Za-z0-9+.-]*://{_LABEL}(?:\.{_LABEL})*(?::[0-9]{{1,5}})?"
        rf"(?:/{_URI_CHAR}*)*(?:\?{_URI_TAIL})?(?:#{_URI_TAIL})?"
    ),
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}


def format_regex(name: str) -> str:
    """What matches some strings of a format; all of them, for most."""
    return _FORMATS[name]


def search_regex(pattern: str) -> str:
    """What matches a whole string in which `pattern` is found somewhere.

    Anchors elsewhere than at the ends of an alternative stay, and llguidance will refuse them.
    """
    wholes = []
    for alternative in _alternatives(pattern):
        start = "" if alternative.startswith("^") else _ANY
        end = "" if _ends_anchored(alternative) else _ANY
        inner = alternative.removeprefix("^")
        inner = inner if end else inner.removesuffix("$")
        wholes.append(f"{start}(?:{inner}){end}")
    return "|".join(wholes)


def _ends_anchored(pattern: str) -> bool:
    """Whether it ends in a `$` that isn't escaped."""
    before = pattern.removesuffix("$")
    num_backslashes = len(before) - len(before.rstrip("\\"))
    return before != pattern and num_backslashes % 2 == 0


def _alternatives(pattern: str) -> list[str]:
    """Split at each `|` that is in no group or class."""
    parts: list[str] = []
    depth = start = i = 0
    in_class = False
    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            i += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            parts.append(pattern[start:i])
            start = i + 1
        i += 1
    return [*parts, pattern[start:]]
