"""The server process: socket, model, HTTP, and an orderly end.

    bind ─▶ launch the engine's process ─▶ answer HTTP ─▶ find the checkpoint
    ─▶ load its tokenizer here, the model there ─▶ ready
    SIGTERM or SIGINT ─▶ an orderly end, as `draining` has it ─▶ the engine ends ─▶ exit code 0

The socket is bound before anything is loaded, so a port in use is known in a moment, and HTTP
answers while the model loads. The engine's process has most to import, so it begins first, and what
only this process needs is imported meanwhile.
"""

import asyncio
import logging
import os
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uvicorn

from bezel.engine.client import SHUTDOWN_GRACE_S, EngineClient
from bezel.engine.errors import ConfigError
from bezel.engine.garbage import nothing_collected
from bezel.engine.metric_families import StartupPhase
from bezel.engine.metrics import Metrics
from bezel.server.config import ServerConfig
from bezel.server.event_loop import watch_lag
from bezel.server.logs import start_server_logging
from bezel.server.open_files import allow_connections

if TYPE_CHECKING:
    from fastapi import FastAPI

    from bezel.server.state import ServedModel, ServerState

logger = logging.getLogger("bezel")

_BACKLOG = 2048
# What the system keeps for a client that doesn't read: it would be megabytes. So much is on its way
# to one far off, who gets it in a fraction of a second.
_SEND_BUFFER_BYTES = 256 * 1024


def serve(config: ServerConfig) -> None:
    """Serve until a signal comes.

    Raises:
        ConfigError: the port is in use, or the model can't be loaded.
        EngineUnavailable: the engine process died while loading it.
    """
    logs = start_server_logging(config)
    config = replace(config, engine=replace(config.engine, logs=logs))
    allow_connections(config.max_connections)
    sock = bind_socket(config.host, config.port)
    with asyncio.Runner(loop_factory=_uvicorn_config("", config).get_loop_factory()) as runner:
        runner.run(_run(config, sock))


def _uvicorn_config(app: "FastAPI | str", config: ServerConfig, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=config.timeout_keep_alive,
        **more,
    )


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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror}") from None
    return sock


async def _run(config: ServerConfig, sock: socket.socket) -> None:
    started_s = time.monotonic()
    metrics = Metrics(vllm_names=config.metrics_compat == "vllm")
    engine = EngineClient(config.engine, metrics.observe_step)
    engine.launch()
    logger.info("listening on %s, loading %s", _url(sock), config.engine.model)
    is_forced = False
    try:
        # Both processes are busy importing for a second; neither waits for the other.
        with nothing_collected():
            from bezel.server.app import create_app
            from bezel.server.connection import limited_protocol
            from bezel.server.draining import UVICORN_TIMEOUT_S, DrainingServer
            from bezel.server.state import ServerState

        state = ServerState(config, metrics)
        http = {
            "http": limited_protocol(config, metrics),
            "timeout_graceful_shutdown": UVICORN_TIMEOUT_S,
        }
        server = DrainingServer(_uvicorn_config(create_app(state), config, **http), state)
        serving = asyncio.create_task(server.serve([sock]))
        watching = asyncio.create_task(watch_lag(metrics.observe_event_loop_lag))
        loading = asyncio.create_task(_load(engine, state, started_s))
        loading.add_done_callback(server.stop_if_failed)
        try:
            await serving
        finally:
            is_forced = server.force_exit
            was_loading = loading.cancel()
            watching.cancel()
            await asyncio.gather(loading, watching, return_exceptions=True)
            if state.model is not None:
                state.model.grammars.close()
            if state.tracing is not None:
                state.tracing.close()
    finally:
        await engine.shutdown(0.0 if is_forced else SHUTDOWN_GRACE_S)
    if was_loading:
        # A download in a thread can't be stopped, and Python would wait for it.
        logging.shutdown()
        os._exit(0)
    loading.result()


async def _load(engine: EngineClient, state: "ServerState", started_s: float) -> None:
    from bezel.engine.checkpoint import resolve_checkpoint
    from bezel.engine.tokenizer import Tokenizer

    note = state.metrics.observe_startup
    checkpoint_s = time.monotonic()
    checkpoint = await asyncio.to_thread(resolve_checkpoint, state.config.engine.model)
    tokenizer_s = time.monotonic()
    note(StartupPhase.CHECKPOINT, tokenizer_s - checkpoint_s)
    starting = asyncio.create_task(engine.start())
    try:
        tokenizer = await asyncio.to_thread(Tokenizer.load, checkpoint)
        note(StartupPhase.TOKENIZER, time.monotonic() - tokenizer_s)
        await starting
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    model = state.set_model(engine, tokenizer, checkpoint)
    note(StartupPhase.READY, time.monotonic() - started_s)
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
