"""HTTP as bytes on sockets, for what no client library would send, or would leave half done."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 120
_GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """One response; `body` is without its framing, and may be cut off."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """That of OpenAI's error object."""
        code: str | None = json.loads(self.body)["error"]["code"]
        return code


def post(path: str, body: Any, **headers: str) -> bytes:
    """A request; `body` is sent as it is, or as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Host": "127.0.0.1", "Content-Type": "application/json"}
    named |= {"Content-Length": str(len(data))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


@contextmanager
def connected(port: int, receive_buffer_bytes: int | None = None) -> Iterator[socket.socket]:
    """A connection to this machine, closed with the block."""
    with socket.socket() as sock:
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        sock.settimeout(TIMEOUT_S)
        sock.connect(("127.0.0.1", port))
        yield sock


def read_all(sock: socket.socket) -> bytes:
    """Until the server closes, as it must at some time."""
    data = b""
    try:
        while piece := sock.recv(1 << 16):
            data += piece
    except ConnectionError:  # reset: bytes that it didn't want were on their way
        pass
    return data


def answers_in(data: bytes) -> list[Answer]:
    """The responses in what a server sent; the last may be cut off."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = first.split(" ")
        assert version == "HTTP/1.1", first
        if status == "100":
            data = rest
            continue
        headers = {name.lower(): value.strip() for name, _, value in map(_parts, lines)}
        body, data = _body(headers, rest)
        found.append(Answer(int(status), headers, body))
    return found


def is_whole(data: bytes) -> bool:
    """Whether the first response has come to its end."""
    head, end, rest = data.removeprefix(_GO_ON).partition(b"\r\n\r\n")
    if not end:
        return False
    lines = head.decode("latin-1").split("\r\n")[1:]
    headers = {name.lower(): value.strip() for name, _, value in map(_parts, lines)}
    if "content-length" in headers:
        return len(rest) >= int(headers["content-length"])
    return rest.endswith(b"0\r\n\r\n")


def _parts(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _body(headers: dict[str, str], rest: bytes) -> tuple[bytes, bytes]:
    """That of a response, and what comes after it."""
    if "chunked" not in headers.get("transfer-encoding", ""):
        length = int(headers.get("content-length", len(rest)))
        return rest[:length], rest[length:]
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
        if not length:
            break
    return body, rest


def events_in(body: bytes) -> list[str]:
    """The data of the events of a stream."""
    lines = body.decode().split("\n")
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def terminal_events_in(events: list[str]) -> list[str]:
    """Those after which nothing comes, in any of the four APIs: an end, or an error."""
    return [event for event in events if event == "[DONE]" or _is_terminal(json.loads(event))]


def _is_terminal(event: dict[str, Any]) -> bool:
    ends = ("response.completed", "response.incomplete", "response.failed", "message_stop", "error")
    return "error" in event or event.get("type") in ends
