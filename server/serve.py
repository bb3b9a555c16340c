"""The server process: socket, model, HTTP, and an orderly end.

    bind ─▶ launch the engine's process ─▶ answer HTTP ─▶ find the checkpoint
    ─▶ load its tokenizer here, the model there ─▶ ready
    SIGTERM or SIGINT ─▶ not ready ─▶ running requests finish, or get an error after
    `shutdown_timeout` ─▶ connections close ─▶ the engine ends ─▶ exit code 0
    a second signal ─▶ the end at once

The socket is bound before anything is loaded, so a port in use is known in a moment, and HTTP
answers while the model loads. The engine's process has most to import, so it begins first, and what
only this process needs is imported meanwhile.
"""

import asyncio
import logging
import os
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from bezel.engine.client import EngineClient
from bezel.engine.errors import ConfigError, EngineUnavailable
from bezel.engine.metrics import Metrics
from bezel.server.config import ServerConfig
from bezel.server.request_id import RequestIdFilter

if TYPE_CHECKING:
    from fastapi import FastAPI

    from bezel.server.state import ServedModel, ServerState

logger = logging.getLogger("bezel")

_BACKLOG = 2048
# What a response may still take once its generation has ended: the time to send some bytes.
_CLOSING_TIMEOUT_S = 5


def serve(config: ServerConfig) -> None:
    """Serve until a signal comes.

    Raises:
        ConfigError: the port is in use, or the model can't be loaded.
        EngineUnavailable: the engine process died while loading it.
    """
    _start_logging()
    sock = bind_socket(config.host, config.port)
    with asyncio.Runner(loop_factory=_uvicorn_config("", config).get_loop_factory()) as runner:
        runner.run(_run(config, sock))


def _uvicorn_config(app: "FastAPI | str", config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=_CLOSING_TIMEOUT_S,
    )


def _start_logging() -> None:
    handler = logging.StreamHandler()
    handler.addFilter(RequestIdFilter())
    form = "%(asctime)s %(levelname)s [%(request_id)s] %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, handlers=[handler])


def bind_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket; clients that connect now are served when the loop runs.

    Raises:
        ConfigError: the address can't be had.
    """
    sock = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror}") from None
    return sock


class DrainingServer(uvicorn.Server):
    """uvicorn, except that the first signal lets running requests finish."""

    def __init__(self, config: uvicorn.Config, state: "ServerState") -> None:
        super().__init__(config)
        self._state = state
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def stop_if_failed(self, loading: asyncio.Task[None]) -> None:
        """End, if there is never going to be a model."""
        if not loading.cancelled() and loading.exception() is not None:
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Unlike uvicorn's, it doesn't keep the signal to raise it again in the end: being
        # asked to stop and having stopped is a success.
        if self._state.is_draining:
            self.force_exit = self.should_exit = True
            return
        logger.info("%s: finishing running requests", signal.Signals(sig).name)
        self._state.is_draining = True
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        in_flight = self._state.in_flight
        try:
            await in_flight.wait_empty(self._state.config.shutdown_timeout)
        except TimeoutError:
            num = in_flight.fail_all(EngineUnavailable("The server is shutting down."))
            logger.warning("ended %d requests that did not finish in time", num)
        self.should_exit = True


async def _run(config: ServerConfig, sock: socket.socket) -> None:
    metrics = Metrics()
    engine = EngineClient(config.engine, metrics.observe_step)
    engine.launch()
    logger.info("listening on %s, loading %s", _url(sock), config.engine.model)
    try:
        # Both processes are busy importing for a second; neither waits for the other.
        from bezel.server.app import create_app
        from bezel.server.state import ServerState

        state = ServerState(config, metrics)
        server = DrainingServer(_uvicorn_config(create_app(state), config), state)
        serving = asyncio.create_task(server.serve([sock]))
        loading = asyncio.create_task(_load(engine, state))
        loading.add_done_callback(server.stop_if_failed)
        try:
            await serving
        finally:
            was_loading = loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            if state.model is not None:
                state.model.grammars.close()
    finally:
        await engine.shutdown()
    if was_loading:
        # A download in a thread can't be stopped, and Python would wait for it.
        logging.shutdown()
        os._exit(0)
    loading.result()


async def _load(engine: EngineClient, state: "ServerState") -> None:
    from bezel.engine.checkpoint import resolve_checkpoint
    from bezel.engine.tokenizer import Tokenizer

    checkpoint = await asyncio.to_thread(resolve_checkpoint, state.config.engine.model)
    starting = asyncio.create_task(engine.start())
    try:
        tokenizer = await asyncio.to_thread(Tokenizer.load, checkpoint)
        await starting
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    model = state.set_model(engine, tokenizer, checkpoint)
    for line in describe(model):
        logger.info(line)


def describe(model: "ServedModel") -> list[str]:
    """What an operator wants to know of a loaded model, in lines for the log."""
    info = model.engine.info
    return [
        f"serving {', '.join(model.names)}: {info.num_parameters / 1e6:,.0f} million parameters, "
        f"{info.dtype} on {info.device}, context of {info.max_model_len} tokens",
    ]


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
