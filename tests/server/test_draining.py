"""An orderly end: grace, drain, error for those who take too long; or, asked twice, at once."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn

from bezel.engine.messages import FinishReason
from bezel.engine.metrics import Metrics
from bezel.server import draining
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.connection import limited_protocol
from bezel.server.draining import DrainingServer
from bezel.server.serve import bind_socket
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


class Running:
    """A draining server on a real socket, in the test's own event loop."""

    def __init__(self, state: ServerState) -> None:
        http = limited_protocol(state.config, state.metrics)
        config = uvicorn.Config(create_app(state), lifespan="off", log_config=None, http=http)
        self.server = DrainingServer(config, state)
        self._sock = bind_socket("127.0.0.1", 0)
        self.port = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.task = asyncio.create_task(self.server.serve([self._sock]))

    def stop(self) -> None:
        """What a signal does."""
        self.server.handle_exit(signal.SIGTERM, None)


@contextlib.asynccontextmanager
async def running(state: ServerState) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    server = Running(state)
    async with httpx.AsyncClient(base_url=server.url) as client:
        # Once it has answered, it has begun to serve and so to handle signals.
        assert (await client.get("/health")).status_code == 200
        yield server, client
    await server.task


async def test_idle_server_stops(state: ServerState) -> None:
    async with running(state) as (server, _):
        server.stop()
        await server.task


async def test_running_requests_finish(make_state: Any, engine: Any, chat: Any) -> None:
    rest = asyncio.Event()
    engine.script = [[65], rest, [66], FinishReason.STOP]
    async with running(make_state()) as (server, client):
        async with client.stream("POST", CHAT, json=chat(stream=True)) as stream:
            server.stop()
            async with httpx.AsyncClient(base_url=server.url) as other:
                assert (await other.get("/ready")).status_code == 503
                assert (await other.get("/health")).status_code == 200
                assert (await other.post(CHAT, json=chat())).status_code == 503
            rest.set()
            text = "".join([part async for part in stream.aiter_text()])
    assert '"content":"B"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert engine.ended == {engine.request_ids[0]: FinishReason.STOP}
    assert len(engine.requests) == 1


async def test_requests_that_take_too_long_get_an_error(
    make_state: Any, engine: Any, chat: Any
) -> None:
    engine.script = [[65], asyncio.Event()]
    async with running(make_state(shutdown_timeout=0)) as (server, client):
        whole = asyncio.create_task(client.post(CHAT, json=chat()))
        async with client.stream("POST", CHAT, json=chat(stream=True)) as stream:
            await engine.begun.wait()
            while len(engine.requests) < 2:
                await asyncio.sleep(0)
            server.stop()
            text = "".join([part async for part in stream.aiter_text()])
        assert (await whole).status_code == 503
    assert '"content":"A"' in text
    assert text.split("data: ")[-1].startswith('{"error":{"message":"The server is shutting down.')
    assert list(engine.ended.values()) == [FinishReason.ABORT] * 2


async def test_second_signal_ends_at_once(state: ServerState, engine: Any, chat: Any) -> None:
    engine.script = [[65], asyncio.Event()]
    async with running(state) as (server, client):
        async with client.stream("POST", CHAT, json=chat(stream=True)):
            server.stop()
            server.stop()
            await server.task


def error_of(text: str) -> str:
    return text.split("data: ")[-1]


async def test_second_signal_leaves_no_stream_without_an_end(
    state: ServerState, engine: Any, chat: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = [[65], asyncio.Event()]
    async with running(state) as (server, client):
        async with client.stream("POST", CHAT, json=chat(stream=True)) as stream:
            await engine.begun.wait()
            server.stop()
            server.stop()
            text = "".join([part async for part in stream.aiter_text()])
        await server.task
    assert error_of(text).startswith('{"error":{"message":"The server is shutting down.')
    assert [record for record in caplog.records if record.exc_info] == []


async def test_requests_are_taken_while_the_grace_lasts(
    make_state: Any, engine: Any, chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, sleep = asyncio.Event(), asyncio.sleep

    async def grace(seconds: float) -> None:
        await (over.wait() if seconds == 77 else sleep(seconds))

    monkeypatch.setattr(draining.asyncio, "sleep", grace)
    engine.say("x")
    state = make_state(shutdown_grace=77)
    async with running(state) as (server, client):
        server.stop()
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert (await client.post(CHAT, json=chat())).status_code == 200
        rest = asyncio.Event()
        engine.script = [[65], rest, [66], FinishReason.STOP]
        running_one = asyncio.create_task(client.post(CHAT, json=chat()))
        while len(engine.requests) < 2:
            await asyncio.sleep(0)
        over.set()
        while not state.is_draining:
            await asyncio.sleep(0)
        refused = await client.post(CHAT, json=chat())
        assert refused.status_code == 503
        # So that the next request of this client goes to somebody else.
        assert refused.headers["connection"] == "close"
        assert (await client.get("/metrics")).status_code == 200
        rest.set()
        assert (await running_one).status_code == 200


async def test_a_server_without_a_model_has_no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ServerState(ServerConfig(shutdown_grace=1000), Metrics())
    async with running(state) as (server, _):
        server.stop()
        await server.task


async def test_who_does_not_let_go_is_cut_off(
    make_state: Any,
    engine: Any,
    chat: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(draining, "_CLOSING_TIMEOUT_S", 0.1)
    engine.script = [[65] * 100] * 3000
    async with running(make_state(shutdown_timeout=0)) as (server, client):
        async with client.stream("POST", CHAT, json=chat(stream=True)):
            half_open = await asyncio.open_connection("127.0.0.1", server.port)
            half_open[1].write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
            while len(server.server.server_state.connections) < 2:
                await asyncio.sleep(0)
            server.stop()
            await server.task
    assert FinishReason.ABORT in engine.ended.values()
    levels = [record.levelno for record in caplog.records if record.name != "asyncio"]
    assert max(levels) < logging.ERROR
