"""One server-sent event as bytes."""

from typing import Any

import msgspec


def sse_event(content: dict[str, Any], name: str | None = None) -> bytes:
    """`content` as JSON; `name` is what a browser's EventSource would listen to."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(content) + b"\n\n"
