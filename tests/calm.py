"""After a fault: nothing is left of it, the next request is answered, and the log explains itself.

A log is explained if each line that isn't about a request that went as it should is one that the
fault had to bring, as given by the test.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from server_process import SETTLE_TIMEOUT_S, Server, resident_kib

CHAT = "/v1/chat/completions"
MODEL = "tiny"
RESTARTED = [
    r"INFO engine \[-\] (loaded|warmed up|plan:) ",
    r"ERROR server \[-\] the engine process (stopped unexpectedly|hung); starting it again$",
]
HUNG = [*RESTARTED, r"ERROR server \[-\] the engine has said nothing for \d+ s; ending it$"]

_LINE = re.compile(r"[\d-]+ [\d:,]+ (?P<told>(?P<level>[A-Z]+) (server|engine) .*)")
_REQUEST = re.compile(r"INFO server \[\S+\] request .*status=(?P<status>\d+)")
# What a server says at its start, its end, and when it closes the connection of a client.
_EXPECTED = [
    r"INFO server \[-\] (listening on|serving) ",
    r"INFO engine \[-\] (loaded|warmed up|plan:) ",
]


def body(words: int = 1, **fields: Any) -> dict[str, Any]:
    """A request with a prompt of so many words."""
    messages = [{"role": "user", "content": "a " * words}]
    return {"model": MODEL, "messages": messages, "max_tokens": 4} | fields


def until(condition: Callable[[], bool], timeout_s: float = SETTLE_TIMEOUT_S) -> None:
    """Wait for it to come true, which it must."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


@dataclass(frozen=True)
class Scale:
    """How much of each fault."""

    num_disconnects: int
    disconnects_s: float
    num_half_open: int
    num_hostile: int
    num_streams: int


class Watch:
    """Looks after one server through all its faults. The log may be None where nobody can read it.

    Memory is that of both processes, in KiB, since the first request was answered.
    """

    def __init__(self, server: Server, log: Path | None) -> None:
        self.server = server
        self._log = log
        self._num_read = 0
        self.assert_answers()
        self._server_kib = resident_kib(server.process.pid)

    def grown_kib(self) -> int:
        """How much more memory the API process has than at the beginning."""
        return resident_kib(self.server.process.pid) - self._server_kib

    def assert_calm(self, *explained: str) -> None:
        """Nothing runs, waits or holds a page; the next request is answered; no line of the log
        since the last time is unexplained: `explained` are patterns of those that are."""
        self.server.wait_idle()
        self.assert_answers()
        self.server.wait_idle()
        unexplained = unexplained_lines(self._new_lines(), explained)
        assert not unexplained, "\n".join(unexplained)

    def assert_answers(self) -> None:
        """A short request gets its whole answer."""
        answer = httpx.post(self.server.url + CHAT, json=body(max_tokens=4), timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert answer.json()["usage"]["completion_tokens"] == 4

    def _new_lines(self) -> list[str]:
        if self._log is None:
            return []
        text = self._log.read_text(encoding="utf-8")
        lines = text[self._num_read :].splitlines()
        self._num_read = len(text)
        return lines


def unexplained_lines(lines: Sequence[str], explained: Sequence[str] = ()) -> list[str]:
    """Those that nobody expects: tracebacks, warnings, answers with a status of the server's fault
    but 503, unless a pattern in `explained` is found in the line after its time."""
    patterns = [re.compile(pattern) for pattern in (*_EXPECTED, *explained)]
    return [line for line in lines if not _is_explained(line, patterns)]


def _is_explained(line: str, patterns: Sequence["re.Pattern[str]"]) -> bool:
    found = _LINE.fullmatch(line)
    if found is None:
        return False  # part of a traceback, or written by something else
    request = _REQUEST.match(found["told"])
    if request is not None:
        return int(request["status"]) in (200, 503) or request["status"].startswith("4")
    return any(pattern.match(found["told"]) for pattern in patterns)
