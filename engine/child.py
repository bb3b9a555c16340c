"""The engine process as its parent sees it: started, spoken to, ended."""

import asyncio
import logging
import multiprocessing
from collections.abc import Callable
from multiprocessing.context import SpawnProcess

import msgspec
import zmq
import zmq.asyncio

from bezel.engine.config import EngineConfig
from bezel.engine.messages import FromEngine, ToEngine
from bezel.engine.process import run_engine

logger = logging.getLogger("bezel")

LAST_WORDS_S = 0.1  # how long a message of a process that has ended may still be in flight
LOOK_S = 1.0  # how often somebody looks whether a silent process hangs
KILLED_TIMEOUT_S = 30.0  # memory of many gigabytes isn't given back at once


class EngineChild:
    """One process and the socket to it, for one life: another process is another `EngineChild`.

    Raises:
        OSError: from the constructor, when the process can't be started.
    """

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        # A spawned process starts clean: forking one with threads and an event loop would not.
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(
            target=run_engine, args=(address,), name="bezel-engine", daemon=True
        )
        try:
            self._process.start()
        except OSError:
            self._socket.close(linger=0)
            raise
        self._ended = asyncio.create_task(_end_of(self._process), name="engine-watch")

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, message: ToEngine | EngineConfig) -> None:
        # Without a high-water mark the message is queued at once; there is nothing to wait for.
        self._socket.send(msgspec.msgpack.encode(message))

    async def receive(self, look: Callable[[], None]) -> FromEngine | None:
        """The next message, or None once the process is gone and has nothing left to say.

        Meanwhile `look` is called every `LOOK_S` seconds.
        """
        received = asyncio.ensure_future(self._socket.recv())
        either = (received, self._ended)
        try:
            while not (
                await asyncio.wait(either, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            )[0]:
                look()
            if not received.done():
                # Last words may still be on their way through the socket.
                await asyncio.wait((received,), timeout=LAST_WORDS_S)
            if not received.done():
                return None
            message: FromEngine = msgspec.msgpack.decode(received.result(), type=FromEngine)
            return message
        finally:
            received.cancel()

    def kill(self) -> None:
        """End it at once; `receive` tells when it is gone."""
        self._process.kill()

    async def join(self, timeout_s: float) -> bool:
        """Wait for its end; whether that came in time."""
        # In a thread: the server goes on answering meanwhile.
        await asyncio.to_thread(self._process.join, timeout_s)
        return self._process.exitcode is not None

    async def close(self) -> None:
        """End it, if it hasn't ended, and let go of everything."""
        self._process.kill()
        self._socket.close(linger=0)
        self._ended.cancel()
        await asyncio.gather(self._ended, return_exceptions=True)
        if await self.join(KILLED_TIMEOUT_S):
            self._process.close()
        else:
            logger.error("the engine process %d can't be killed; it is left behind", self.pid)


async def _end_of(process: SpawnProcess) -> None:
    """Wait until a process has ended, which makes its sentinel readable."""
    loop, sentinel = asyncio.get_running_loop(), process.sentinel
    ended = loop.create_future()

    def on_readable() -> None:
        loop.remove_reader(sentinel)
        ended.set_result(None)

    loop.add_reader(sentinel, on_readable)
    try:
        await ended
    finally:
        loop.remove_reader(sentinel)
