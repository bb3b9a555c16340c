"""The engine process: takes messages between steps, sends what each step produced.

JSON, HTTP and text stay in the API process, so they never take this process's interpreter lock.
It ends when told to, or when its parent is gone.
"""

import logging
import multiprocessing
import signal
import time
from typing import TYPE_CHECKING

import msgspec
import zmq

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.garbage import nothing_collected
from bezel.engine.lazy_imports import import_torch
from bezel.engine.logs import hold_lines, last_words, start_logging
from bezel.engine.messages import (
    AddSequence,
    FailureCause,
    FinishReason,
    FinishSequence,
    FromEngine,
    SequenceOutput,
    Shutdown,
    StartFailed,
    StepOutput,
    ToEngine,
)

if TYPE_CHECKING:
    from bezel.engine.core import Engine

logger = logging.getLogger("bezel")

IDLE_POLL_MS = 1000  # how soon a process without a parent notices


def run_engine(address: str) -> None:
    """Entry point of the spawned process; talks over a ZeroMQ pair socket at `address`.

    The first message is an `EngineConfig`. What has to be imported is imported before it comes.
    """
    started = time.monotonic()
    # Ctrl-C reaches every process of a terminal, and a service manager's SIGTERM every process of
    # a service; when to stop is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    held = hold_lines()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)
        # Before all the imports: a message to nobody would wait in the parent, which sends it when
        # somebody is there, but not while it reads its tokenizer, for a second.
        socket.connect(address)
        with nothing_collected():
            import_torch()
            # Here, not above: the API process imports this module too, and stays free of torch.
            from bezel.engine.core import Engine
            from bezel.engine.planning.machine import plan_of
            from bezel.engine.planning.report import gist

        startup_seconds = {"imports": time.monotonic() - started}
        with last_words():
            message = _next_message(socket)
            if message is None:
                return
            config = msgspec.msgpack.decode(message, type=EngineConfig)
            start_logging("engine", config.logs, held=held)
            try:
                engine = Engine(config)
            except ConfigError as error:
                _send(socket, StartFailed(error.message))
                return
            for line in gist(plan_of(engine)):
                logger.info(line)
            startup_seconds |= engine.info.startup_seconds
            _send(socket, msgspec.structs.replace(engine.info, startup_seconds=startup_seconds))
            _serve(engine, socket)


def _has_parent() -> bool:
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


def _next_message(socket: "zmq.Socket[bytes]") -> bytes | None:
    """Wait for one; None if the parent is gone."""
    while _has_parent():
        if socket.poll(IDLE_POLL_MS):
            return socket.recv()
    return None


def _serve(engine: "Engine", socket: "zmq.Socket[bytes]") -> None:
    decoder = msgspec.msgpack.Decoder(ToEngine)
    owes_report = False
    while _has_parent():
        while socket.poll(0 if engine.has_work or owes_report else IDLE_POLL_MS):
            message = decoder.decode(socket.recv())
            if isinstance(message, Shutdown):
                return
            _handle(engine, socket, message)
            # The parent takes silence for a hang, so every message gets an answer.
            owes_report = True
        if engine.has_work:
            _send(socket, engine.step())
            owes_report = engine.has_work
        elif owes_report:
            # The last sequences may have been ended from outside, with no step to tell of it.
            _send(socket, engine.report())
            owes_report = False


def _handle(
    engine: "Engine", socket: "zmq.Socket[bytes]", message: AddSequence | FinishSequence
) -> None:
    if isinstance(message, FinishSequence):
        engine.finish(message.request_id, message.reason)
    elif engine.can_serve(message):
        engine.add(message)
    else:
        refusal = SequenceOutput(
            request_id=message.request_id,
            token_ids=[],
            finish_reason=FinishReason.ERROR,
            failure=FailureCause.ENGINE,
        )
        report = engine.report()
        _send(socket, StepOutput(outputs=[refusal], stats=report.stats))


def _send(socket: "zmq.Socket[bytes]", message: FromEngine) -> None:
    socket.send(msgspec.msgpack.encode(message))
