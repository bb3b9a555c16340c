"""What a client can hold on to without asking for anything: time, memory, places."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import httpx
import pytest
import uvicorn

from bezel.engine.messages import FinishReason
from bezel.engine.metrics import Metrics
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.connection import ConnectionLimits, LimitedConnection, limited_protocol
from bezel.server.serve import bind_socket
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
PATIENT = ConnectionLimits(
    max_connections=2000,
    max_header_bytes=16 * 1024,
    max_body_bytes=100_000,
    receive_timeout_s=60,
    send_timeout_s=60,
    request_timeout_s=60,
)


class Client:
    """One connection, spoken to in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of the next response."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        return int(head.split()[1]), json.loads(await self.reader.readexactly(length))

    async def rest(self) -> bytes:
        """All that comes until the server closes; nothing more if it cuts off."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


class Served:
    """An app on a port, in the test's own event loop."""

    def __init__(self, state: ServerState, limits: ConnectionLimits, keep_alive_s: int) -> None:
        self._metrics = state.metrics
        http: Any = partial(LimitedConnection, limits=limits, metrics=state.metrics)
        config = uvicorn.Config(
            create_app(state),
            lifespan="off",
            log_config=None,
            http=http,
            timeout_keep_alive=keep_alive_s,
        )
        self.server = uvicorn.Server(config)
        self.sock = bind_socket("127.0.0.1", 0)
        # Less than it would be, or it would take long to fill.
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)

    async def closed_by(self, reason: str, num: int = 1) -> None:
        """Wait until so many connections have been closed for that reason; none was for another,
        and what is open is told."""
        form = r'^bezel_connections_closed_total{reason="(\w+)"} (?!0)(\S+)$'
        told: list[tuple[str, str]] = []
        async with asyncio.timeout(10):
            while not told:
                await asyncio.sleep(0.001)
                text = self._metrics.render()[0].decode()
                told = re.findall(form, text, re.MULTILINE)
        assert told == [(reason, f"{num}.0")]
        assert f"\nbezel_connections_open {self.num_connections}.0\n" in text

    async def connect(self, receive_buffer: int | None = None) -> Client:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return Client(*await asyncio.open_connection(sock=sock, limit=4096))


@pytest.fixture
async def serve(make_state: Callable[..., ServerState]) -> AsyncIterator[Callable[..., Any]]:
    """Serve with limits unlike those of the patient."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(keep_alive_s: int = 5, **limits: Any) -> Served:
            served = Served(make_state(), replace(PATIENT, **limits), keep_alive_s)
            serving = asyncio.create_task(served.server.serve([served.sock]))

            async def stop() -> None:
                served.server.should_exit = served.server.force_exit = True
                await asyncio.wait({serving}, timeout=5)

            stack.push_async_callback(stop)
            return served

        yield start


def replace(limits: ConnectionLimits, **changes: Any) -> ConnectionLimits:
    fields = {name: getattr(limits, name) for name in limits.__slots__}
    return ConnectionLimits(**(fields | changes))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def request(body: Any, path: str = CHAT) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


def test_the_limits_are_those_of_the_settings() -> None:
    config = ServerConfig(
        max_connections=1,
        max_header_bytes=2000,
        max_body_bytes=5000,
        receive_timeout=3,
        send_timeout=4,
    )
    made: Any = limited_protocol(config, Metrics())
    assert made.keywords["limits"] == ConnectionLimits(
        max_connections=1,
        max_header_bytes=2000,
        max_body_bytes=5000,
        receive_timeout_s=3,
        send_timeout_s=4,
        request_timeout_s=3600,
    )


async def test_who_sends_nothing_is_let_go(serve: Any) -> None:
    served = await serve(receive_timeout_s=0.05)
    client = await served.connect()
    assert await client.rest() == b""
    await until(lambda: served.num_connections == 0)
    await served.closed_by("receive_timeout")


async def test_half_a_head_is_not_waited_for(serve: Any) -> None:
    served = await serve(receive_timeout_s=0.2)
    client = await served.connect()

    async def trickle() -> None:
        for byte in b"GET /health HTTP/1.1\r\nX-Slow: " + b"a" * 10_000:
            client.send(bytes([byte]))
            await asyncio.sleep(0.01)

    trickling = asyncio.create_task(trickle())
    status, body = await client.answer()
    trickling.cancel()
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert await client.rest() == b""
    await served.closed_by("receive_timeout")


async def test_a_body_may_come_slowly_but_not_stop(serve: Any, engine: Any, chat: Any) -> None:
    served = await serve(receive_timeout_s=0.3)
    engine.say("x")
    client = await served.connect()
    data = request(chat())
    begin = data.index(b"{")
    client.send(data[:begin])
    for byte in data[begin:]:
        client.send(bytes([byte]))
        await asyncio.sleep(0.01)  # twice as long as the timeout, in all
    assert (await client.answer())[0] == 200
    client.send(data[:-1])
    assert (await client.answer())[0] == 408
    assert len(engine.requests) == 1


async def test_a_body_may_not_take_longer_than_the_answer(
    serve: Any, engine: Any, chat: Any
) -> None:
    served = await serve(receive_timeout_s=60, request_timeout_s=0.2)
    client = await served.connect()
    data = request(chat())

    async def trickle() -> None:
        for byte in data[:-1]:
            client.send(bytes([byte]))
            await asyncio.sleep(0.01)

    trickling = asyncio.create_task(trickle())
    assert (await client.answer())[0] == 408
    trickling.cancel()
    assert engine.requests == []


async def test_an_idle_connection_lives_on_after_its_request(serve: Any) -> None:
    served = await serve(receive_timeout_s=0.1)
    client = await served.connect()
    idle = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    client.send(idle)
    assert (await client.answer())[0] == 200
    other = await served.connect()
    assert await other.rest() == b"", "its time was up"
    client.send(idle)
    assert (await client.answer())[0] == 200


async def test_an_answer_may_take_longer_than_the_request(
    serve: Any, engine: Any, chat: Any
) -> None:
    served = await serve(receive_timeout_s=0.1)
    begin = asyncio.Event()
    engine.script = [begin, [65], FinishReason.LENGTH]
    client = await served.connect()
    client.send(request(chat()))
    other = await served.connect()
    assert await other.rest() == b"", "its time was up"
    begin.set()
    assert (await client.answer())[0] == 200


async def flood(client: Client, chunk: bytes) -> tuple[int, bytes]:
    """Send until the server has had enough; how much that was, and what it says."""
    num_bytes, answer = 0, asyncio.create_task(client.rest())
    while not answer.done():
        client.send(chunk)
        num_bytes += len(chunk)
        with contextlib.suppress(ConnectionError):
            await client.writer.drain()
        await asyncio.sleep(0)
    return num_bytes, await answer


@pytest.mark.parametrize(
    "begin",
    [b"GET /", b"GET / HTTP/1.1\r\nX-Long: ", b"GET / HTTP/1.1\r\nX-"],
    ids=["URL", "value", "name"],
)
async def test_a_head_without_end(serve: Any, begin: bytes) -> None:
    served = await serve()
    client = await served.connect()
    client.send(begin)
    num_bytes, answer = await flood(client, b"a" * 8192)
    assert num_bytes < 20_000_000
    # What the client sends on may keep it from reading the answer.
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    await until(lambda: served.num_connections == 0)
    await served.closed_by("max_header_bytes")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health?" + b"a" * 17_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 17_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 300 + b"\r\n",
    ],
    ids=["URL", "bytes", "number"],
)
async def test_a_head_that_is_too_large(serve: Any, head: bytes) -> None:
    served = await serve()
    client = await served.connect()
    client.send(head)
    status, body = await client.answer()
    assert (status, body["error"]["code"]) == (431, "headers_too_large")
    assert await client.rest() == b""
    await served.closed_by("max_header_bytes")


async def test_a_refused_body_is_read_to_its_end(serve: Any) -> None:
    """By then the client looks at the answer, and the connection is good for another request."""
    client = await (await serve()).connect()
    client.send(b"POST /nowhere HTTP/1.1\r\nContent-Length: 90000\r\n\r\n")
    assert (await client.answer())[0] == 404
    client.send(b"a" * 90_000 + b"GET /health HTTP/1.1\r\n\r\n")
    assert await client.answer() == (200, {"status": "ok"})


async def test_a_refused_body_without_end(serve: Any) -> None:
    served = await serve()
    client = await served.connect()
    client.send(b"POST /nowhere HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (await client.answer())[0] == 404
    num_bytes, _ = await flood(client, b"2000\r\n" + b"a" * 8192 + b"\r\n")
    assert num_bytes < 20_000_000
    await until(lambda: served.num_connections == 0)
    await served.closed_by("max_body_bytes")


async def test_headers_that_are_large_but_not_too_large(serve: Any) -> None:
    client = await (await serve()).connect()
    client.send(b"GET /health HTTP/1.1\r\n" + b"X: " + b"y" * 50 + b"\r\n" * 1)
    client.send((b"X: " + b"y" * 50 + b"\r\n") * 200 + b"\r\n")
    assert (await client.answer())[0] == 200


async def test_what_comes_after_the_body_is_counted_too(serve: Any) -> None:
    served = await serve()
    client = await served.connect()
    head = b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    client.send(head + b"1\r\n{\r\n0\r\nX-Trailer: ")
    num_bytes, _ = await flood(client, b"a" * 8192)
    assert num_bytes < 20_000_000
    await until(lambda: served.num_connections == 0)


async def test_what_is_not_http(serve: Any) -> None:
    served = await serve()
    client = await served.connect()
    client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    status, body = await client.answer()
    assert (status, body["error"]["code"]) == (400, "invalid_request")
    assert await client.rest() == b""
    await served.closed_by("malformed")


async def test_who_does_not_read_is_cut_off(serve: Any, engine: Any, chat: Any) -> None:
    served = await serve(send_timeout_s=0.1)
    engine.script = [[65] * 100] * 2000
    client = await served.connect(receive_buffer=4096)
    client.send(request(chat(stream=True)))
    await until(lambda: FinishReason.ABORT in engine.ended.values())
    await until(lambda: served.num_connections == 0)
    await served.closed_by("send_timeout")


async def test_who_reads_too_slowly_loses_the_rest(
    serve: Any, engine: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bezel.server.generation._MAX_PENDING", 100)
    served = await serve()
    engine.script = [[65] * 100] * 2000
    client = await served.connect(receive_buffer=32768)
    client.send(request(chat(stream=True)))
    await until(lambda: FinishReason.ABORT in engine.ended.values())
    text = (await client.rest()).decode()
    assert text.count('"error":') == 1
    last = text[text.rindex('{"error":') :]
    assert '"code":"slow_reader"' in last
    assert "chunk" not in last and "[DONE]" not in last


async def test_half_open_connections_harm_nobody(serve: Any, engine: Any, chat: Any) -> None:
    served = await serve()
    engine.say("x")
    half = [await served.connect() for _ in range(500)]
    for client in half[::2]:
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 100\r\n")
    async with httpx.AsyncClient(base_url=served.url) as client:
        assert (await client.post(CHAT, json=chat())).status_code == 200
    assert served.num_connections >= 500
    for client in half:
        client.writer.transport.abort()
    await until(lambda: served.num_connections == 0)


async def test_more_connections_than_there_may_be(serve: Any, engine: Any, chat: Any) -> None:
    served = await serve(max_connections=2)
    engine.say("x")
    waiting = [await served.connect() for _ in range(2)]
    await until(lambda: served.num_connections == 2)
    client = await served.connect()
    client.send(b"GET /health HTTP/1.1\r\n\r\n")
    assert (await client.answer())[0] == 200
    client.send(request(chat()))
    status, body = await client.answer()
    assert (status, body["error"]["code"]) == (503, "server_is_overloaded")
    assert await client.rest() == b""
    await served.closed_by("max_connections")
    waiting[0].writer.close()
    await until(lambda: served.num_connections == 1)
    async with httpx.AsyncClient(base_url=served.url) as other:
        assert (await other.post(CHAT, json=chat())).status_code == 200


async def test_so_many_connections_that_they_are_not_even_told(serve: Any) -> None:
    served = await serve(max_connections=1)
    open_ones = [await served.connect() for _ in range(129)]
    await until(lambda: served.num_connections == 129)
    assert await (await served.connect()).rest() == b""
    assert len(open_ones) == served.num_connections
    await served.closed_by("max_connections")


async def test_a_client_that_leaves_after_a_second_request(
    serve: Any, engine: Any, chat: Any
) -> None:
    """uvicorn alone would let the first generate to its end."""
    served = await serve()
    engine.script = [[65], asyncio.Event()]
    client = await served.connect()
    client.send(request(chat(stream=True)) + request(chat(stream=True)))
    await engine.begun.wait()
    client.writer.transport.abort()
    await until(lambda: FinishReason.ABORT in engine.ended.values())
    assert len(engine.requests) == 1
    await served.closed_by("client")


async def test_connections_that_are_no_longer_used(serve: Any) -> None:
    served = await serve(keep_alive_s=0)
    client = await served.connect()
    client.send(b"GET /health HTTP/1.1\r\n\r\n")
    assert (await client.answer())[0] == 200
    assert await client.rest() == b""
    await served.closed_by("timeout_keep_alive")


async def test_connections_that_end_as_they_should(serve: Any) -> None:
    served = await serve()
    client = await served.connect()
    client.send(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert (await client.answer())[0] == 200
    assert await client.rest() == b""
    await served.closed_by("server")


async def test_clients_that_have_had_enough(serve: Any) -> None:
    served = await serve()
    for client in [await served.connect() for _ in range(3)]:
        client.send(b"GET /health HTTP/1.1\r\n\r\n")
        assert (await client.answer())[0] == 200
        client.writer.close()
    await until(lambda: served.num_connections == 0)
    await served.closed_by("client", 3)


@pytest.mark.parametrize("pieces", [1, 2, 400])
async def test_another_protocol_is_asked_for_in_vain(
    serve: Any, engine: Any, chat: Any, pieces: int
) -> None:
    """As Java's client asks for HTTP/2."""
    engine.say("x")
    client = await (await serve()).connect()
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    asked = request(chat()).replace(b"Host: x\r\n", b"Host: x\r\n" + upgrade)
    for data in (asked, request(chat()), b"GET /health HTTP/1.1\r\n" + upgrade + b"\r\n", asked):
        step = len(data) // pieces + 1
        for start in range(0, len(data), step):
            client.send(data[start : start + step])
            await asyncio.sleep(0.001 if pieces > 1 else 0)
        assert (await client.answer())[0] == 200
    assert len(engine.requests) == 3
