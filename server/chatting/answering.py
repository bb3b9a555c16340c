"""Following a stream to its end, whichever that is."""

import sys
from collections.abc import Callable, Generator
from contextlib import closing
from enum import IntEnum
from typing import Any

from bezel.server.chatting.connection import Connection, ServerFailed
from bezel.server.chatting.display import Display


class Outcome(IntEnum):
    """How a question ended; of the only one it is the exit code."""

    ANSWERED = 0
    FAILED = 1
    STOPPED = 130  # as shells have it for Ctrl-C


def follow(
    chunks: Generator[dict[str, Any], None, None],
    take: Callable[[dict[str, Any]], None],
    display: Display,
) -> Outcome:
    """Hand every chunk to `take`. Ctrl-C ends the stream; the server's error is told in a line."""
    try:
        with closing(chunks):
            for chunk in chunks:
                take(chunk)
    except KeyboardInterrupt:
        display.end("stopped")
        return Outcome.STOPPED
    except ServerFailed as error:
        display.end()
        print(f"bezel: error: {error}", file=sys.stderr)
        return Outcome.FAILED
    return Outcome.ANSWERED


def greet(connection: Connection) -> Outcome:
    """Tell somebody who is about to type who will answer, if anybody will."""
    try:
        print(f"{connection.model} at {connection.url}, Ctrl-D leaves")
    except ServerFailed as error:
        print(f"bezel: error: {error}", file=sys.stderr)
        return Outcome.FAILED
    return Outcome.ANSWERED
