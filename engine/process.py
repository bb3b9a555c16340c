"""The engine process: takes messages between steps, sends what each step produced.

JSON, HTTP and text stay in the API process, so they never take this process's interpreter lock.
It ends when told to, or when its parent is gone.
"""

import logging
import multiprocessing
import signal
from typing import TYPE_CHECKING

import msgspec
import zmq

from bezel.engine.config import EngineConfig
from bezel.engine.errors import BezelError, ConfigError
from bezel.engine.messages import (
    AddSequence,
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
    # Ctrl-C reaches every process of a terminal, and a service manager's SIGTERM every process of
    # a service; when to stop is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Here, not above: the API process imports this module too, and stays free of torch.
    from bezel.engine.core import Engine
    from bezel.engine.planning.machine import plan_of
    from bezel.engine.planning.report import gist

    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)
        socket.connect(address)
        message = _next_message(socket)
        if message is None:
            return
        try:
            engine = Engine(msgspec.msgpack.decode(message, type=EngineConfig))
        except ConfigError as error:
            _send(socket, StartFailed(error.message))
            return
        for line in gist(plan_of(engine)):
            logger.info(line)
        _send(socket, engine.info)
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
    was_busy = False
    while _has_parent():
        while socket.poll(0 if engine.has_work or was_busy else IDLE_POLL_MS):
            message = decoder.decode(socket.recv())
            if isinstance(message, Shutdown):
                return
            _handle(engine, socket, message)
        if engine.has_work:
            _send(socket, engine.step())
        elif was_busy:
            # The last sequences may have been ended from outside, with no step to tell of it.
            _send(socket, engine.report())
        was_busy = engine.has_work


def _handle(
    engine: "Engine", socket: "zmq.Socket[bytes]", message: AddSequence | FinishSequence
) -> None:
    if isinstance(message, FinishSequence):
        engine.finish(message.request_id, message.reason)
    elif not _add(engine, message):
        refusal = SequenceOutput(
            request_id=message.request_id, token_ids=[], finish_reason=FinishReason.ERROR
        )
        report = engine.report()
        _send(socket, StepOutput(outputs=[refusal], stats=report.stats))


def _add(engine: "Engine", message: AddSequence) -> bool:
    """Whether the sequence was queued."""
    if not engine.can_serve(message):
        return False
    try:
        engine.add(message)
    except BezelError as error:
        logger.warning("%s can't be served: %s", message.request_id, error.message)
        return False
    return True


def _send(socket: "zmq.Socket[bytes]", message: FromEngine) -> None:
    socket.send(msgspec.msgpack.encode(message))
