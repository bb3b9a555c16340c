"""The API process's handle on the engine process: starts it, feeds it, and starts it anew.

One asyncio task reads what the engine sends and hands it to the generator of each request; another
watches the process. If the process dies every open generator raises `EngineUnavailable` and a new
process is started, after a pause that doubles with each failure.
"""

import asyncio
import atexit
import logging
import multiprocessing
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError, EngineUnavailable, Overloaded
from bezel.engine.messages import (
    AddSequence,
    EngineInfo,
    FinishReason,
    FinishSequence,
    FromEngine,
    SequenceOutput,
    Shutdown,
    StartFailed,
    StepOutput,
    StepStats,
    ToEngine,
)
from bezel.engine.process import run_engine
from bezel.engine.sampling_params import SamplingParams

logger = logging.getLogger("bezel")

SHUTDOWN_GRACE_S = 5.0  # for the step under way; after that the process is killed
LAST_WORDS_S = 0.1  # how long a message of a process that has ended may still be in flight
MAX_RESTART_PAUSE_S = 30.0

_Stream = asyncio.Queue[SequenceOutput | EngineUnavailable]


class EngineClient:
    """Runs one engine process. Use it from one event loop only."""

    def __init__(self, config: EngineConfig, on_step: Callable[[StepStats], None]) -> None:
        self._config = config
        self._on_step = on_step
        self._limit = config.max_num_seqs + config.max_num_queued_reqs
        self._streams: dict[str, _Stream] = {}
        self._info: EngineInfo | None = None
        self._process: SpawnProcess | None = None
        self._gone: asyncio.Task[None] | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._context = zmq.asyncio.Context()
        self._folder = tempfile.TemporaryDirectory(prefix="bezel-")
        self._supervisor: asyncio.Task[None] | None = None
        self._is_ready = False
        self._is_closing = False
        self._last_heard = time.monotonic()
        self.num_restarts = 0

    @property
    def info(self) -> EngineInfo:
        """Limits and sizes of the loaded model; known once `start` has returned."""
        assert self._info is not None, "the engine hasn't started"
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    @property
    def step_age_s(self) -> float:
        """Seconds since the engine was last heard of while work is pending; 0 when idle."""
        return time.monotonic() - self._last_heard if self._streams else 0.0

    def launch(self) -> None:
        """Begin the process ahead of `start`: until then it imports what it needs, for a second or
        two, and neither looks for the model nor loads it."""
        self._spawn()
        # Whoever forgets `shutdown` should get to an end all the same: multiprocessing, whose own
        # exit handler is there by now and so comes after this one, would wait for a process that
        # ignores SIGTERM, and ZeroMQ for its socket.
        atexit.register(self._abandon)

    async def start(self) -> None:
        """Have the process load the model, and wait until it has; launches it if that wasn't done.

        Raises:
            ConfigError: the engine can't start with this configuration.
        """
        if self._process is None:
            self.launch()
        await self._load()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Yield the tokens of one sequence; the last output carries the finish reason.

        Closing the generator early aborts the sequence, in whatever phase it is.

        Raises:
            Overloaded: before the first output, when the queue is full.
            EngineUnavailable: when the engine isn't there, or dies meanwhile.
        """
        self._check_admission()
        stream = self._streams[request_id] = asyncio.Queue()
        if len(self._streams) == 1:
            self._last_heard = time.monotonic()
        self._send(AddSequence(request_id, prompt_ids, params))
        try:
            while True:
                output = await stream.get()
                if isinstance(output, EngineUnavailable):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self.finish(request_id, FinishReason.ABORT)

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End a sequence early; nothing happens if it has already ended."""
        if self._streams.pop(request_id, None) is not None and self._is_ready:
            self._send(FinishSequence(request_id, reason))

    async def shutdown(self) -> None:
        """End the process, kindly first; open generators raise `EngineUnavailable`."""
        self._is_closing = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_streams("The server is shutting down.")
        if self._is_ready and self._process is not None:
            self._send(Shutdown())
            await asyncio.to_thread(self._process.join, SHUTDOWN_GRACE_S)
        await self._reap()
        atexit.unregister(self._abandon)
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def _check_admission(self) -> None:
        if not self._is_ready or self._is_closing:
            raise EngineUnavailable("The engine is not ready; it is starting or shutting down.")
        if len(self._streams) >= self._limit:
            raise Overloaded("The server's queue is full; try again shortly.", retry_after_s=1)

    def _spawn(self) -> None:
        """Start a process that waits for its configuration."""
        address = f"ipc://{Path(self._folder.name) / f'engine-{self.num_restarts}'}"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        # A spawned process starts clean: forking one with threads and an event loop would not.
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(
            target=run_engine, args=(address,), name="bezel-engine", daemon=True
        )
        process.start()
        self._process = process
        self._gone = asyncio.create_task(_end_of(self._process), name="engine-watch")

    async def _load(self) -> None:
        """Send the configuration, and take the answer to it."""
        assert self._socket is not None
        self._socket.send(msgspec.msgpack.encode(self._config))
        message = await self._receive()
        if message is None:
            raise EngineUnavailable("The engine process ended while loading; see its log above.")
        if isinstance(message, StartFailed):
            raise ConfigError(message.message)
        assert isinstance(message, EngineInfo)
        self._info = message
        self._is_ready = True

    async def _supervise(self) -> None:
        """Read until the process is gone, then replace it; for as long as the server lives."""
        while True:
            try:
                while (message := await self._receive()) is not None:
                    assert isinstance(message, StepOutput)
                    self._take(message)
            except Exception:
                # Our own mistake, but streams must not wait for ever for nobody to read.
                logger.exception("what the engine sent could not be taken")
            self._is_ready = False
            logger.error("the engine process ended unexpectedly; starting it again")
            self._fail_streams("The engine stopped unexpectedly and is being restarted.")
            await self._restart()

    async def _restart(self) -> None:
        pause_s = 1.0
        while not self._is_ready:
            await self._reap()
            self.num_restarts += 1
            try:
                self._spawn()
                await self._load()
            except (EngineUnavailable, ConfigError, OSError) as error:
                logger.error("engine restart failed, next try in %.0f s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RESTART_PAUSE_S)

    async def _receive(self) -> FromEngine | None:
        """The next message, or None once the process is gone and has nothing left to say."""
        assert self._socket is not None and self._gone is not None
        received = asyncio.ensure_future(self._socket.recv())
        await asyncio.wait((received, self._gone), return_when=asyncio.FIRST_COMPLETED)
        if not received.done():
            # Last words may still be on their way through the socket.
            await asyncio.wait((received,), timeout=LAST_WORDS_S)
        if not received.done():
            received.cancel()
            return None
        message: FromEngine = msgspec.msgpack.decode(received.result(), type=FromEngine)
        self._last_heard = time.monotonic()
        return message

    def _take(self, step: StepOutput) -> None:
        self._on_step(step.stats)
        for output in step.outputs:
            # A stream that isn't there was ended by us; the engine hears of it a step later.
            if stream := self._streams.get(output.request_id):
                stream.put_nowait(output)
                if output.finish_reason is not None:
                    del self._streams[output.request_id]

    def _fail_streams(self, message: str) -> None:
        for stream in self._streams.values():
            stream.put_nowait(EngineUnavailable(message))
        self._streams.clear()

    def _send(self, message: ToEngine) -> None:
        assert self._socket is not None
        # Without a high-water mark the message is queued at once; there is nothing to wait for.
        self._socket.send(msgspec.msgpack.encode(message))

    def _abandon(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._context.destroy(linger=0)

    async def _reap(self) -> None:
        if self._gone is not None:
            self._gone.cancel()
            await asyncio.gather(self._gone, return_exceptions=True)
            self._gone = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None


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
