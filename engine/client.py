"""The API process's handle on the engine process: starts it, feeds it, and starts it anew.

One asyncio task reads what the engine sends and hands it to the generator of each request. If the
process dies, or says nothing for too long with work pending, every open generator raises
`EngineUnavailable` and a new process is started, after a pause that doubles with each failure.
"""

import asyncio
import atexit
import logging
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import zmq.asyncio

from bezel.engine.child import LOOK_S, EngineChild
from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError, EngineUnavailable
from bezel.engine.messages import (
    AddSequence,
    EngineInfo,
    FinishReason,
    FinishSequence,
    FromEngine,
    PrefixStats,
    SequenceOutput,
    Shutdown,
    StartFailed,
    StepOutput,
    StepStats,
    ToEngine,
)
from bezel.engine.patience import hang_timeout_s
from bezel.engine.sampling_params import SamplingParams

logger = logging.getLogger("bezel")

SHUTDOWN_GRACE_S = 5.0  # for the step under way; after that the process is killed
MAX_RESTART_PAUSE_S = 30.0
# An engine that lived for so long has proved that it can: the next one is started at once.
PROVEN_S = 60.0
LOADING_NOTICE_S = 60.0  # how often it is said that an engine is still loading

_WARM_UP_ID = "warm-up"
# The state of an engine that isn't there.
_NOTHING = StepStats(
    num_running=0,
    num_waiting=0,
    local_pages_used=0,
    global_pages_used=0,
    num_prefill_tokens=0,
    num_decode_tokens=0,
    num_preemptions=0,
    prefix=PrefixStats(),
    step_seconds=0.0,
)

_Stream = asyncio.Queue[SequenceOutput | EngineUnavailable]


class EngineClient:
    """Runs one engine process. Use it from one event loop only."""

    def __init__(self, config: EngineConfig, on_step: Callable[[StepStats], None]) -> None:
        self._config = config
        self._on_step = on_step
        self._streams: dict[str, _Stream] = {}
        self._info: EngineInfo | None = None
        self._child: EngineChild | None = None
        self._context = zmq.asyncio.Context()
        self._folder = tempfile.TemporaryDirectory(prefix="bezel-")
        self._supervisor: asyncio.Task[None] | None = None
        self._is_ready = False
        self._is_closing = False
        # An answer is due: a step, or word that there is nothing left to do.
        self._is_due = False
        self._last_heard = time.monotonic()
        self._silent_s = self._loading_s = 0.0
        self._is_hung = False
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
        """Seconds since the engine was last heard of with work pending, or was lost and couldn't be
        replaced yet; 0 when idle."""
        is_lost = self._supervisor is not None and not self._is_ready
        return time.monotonic() - self._last_heard if self._is_due or is_lost else 0.0

    def launch(self) -> None:
        """Begin the process ahead of `start`: until then it imports what it needs, for a second or
        two, and neither looks for the model nor loads it."""
        self._spawn()
        # Whoever forgets `shutdown` should get to an end all the same: multiprocessing, whose own
        # exit handler is there by now and so comes after this one, would wait for a process that
        # ignores SIGTERM, and ZeroMQ for its socket.
        atexit.register(self._abandon)

    async def start(self) -> None:
        """Have the process load the model and compute a first token, and wait until it has;
        launches it if that wasn't done.

        Raises:
            ConfigError: the engine can't start with this configuration.
            EngineUnavailable: the process died, or its first token couldn't be had.
        """
        if self._child is None:
            self.launch()
        await self._load()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Yield the tokens of one sequence; the last output carries the finish reason.

        Closing the generator early aborts the sequence, in whatever phase it is.

        Raises:
            EngineUnavailable: when the engine isn't there, or dies meanwhile.
        """
        if not self._is_ready or self._is_closing:
            raise EngineUnavailable("The engine is not ready; it is starting or shutting down.")
        stream = self._streams[request_id] = asyncio.Queue()
        self._ask(AddSequence(request_id, prompt_ids, params))
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
            self._ask(FinishSequence(request_id, reason))

    async def shutdown(self, grace_s: float = SHUTDOWN_GRACE_S) -> None:
        """End the process, kindly first, for `grace_s`; open generators raise
        `EngineUnavailable`."""
        self._is_closing = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_streams("The server is shutting down.")
        if self._is_ready and self._child is not None:
            self._child.send(Shutdown())
            await self._child.join(grace_s)
        await self._reap()
        atexit.unregister(self._abandon)
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def _spawn(self) -> None:
        """Start a process that waits for its configuration."""
        path = Path(self._folder.name) / f"engine-{self.num_restarts}"
        self._child = EngineChild(self._context, f"ipc://{path}")

    async def _load(self) -> None:
        """Send the configuration, take the answer to it, and have a first token computed."""
        assert self._child is not None
        self._is_due = self._is_hung = False
        self._loading_s = 0.0
        self._child.send(self._config)
        message = await self._receive()
        if message is None:
            raise EngineUnavailable("The engine process ended while loading; see its log above.")
        if isinstance(message, StartFailed):
            raise ConfigError(message.message)
        assert isinstance(message, EngineInfo)
        self._info = message
        await self._warm_up(message)
        self._is_ready = True

    async def _warm_up(self, info: EngineInfo) -> None:
        """Have the whole way to a token and back gone once, with nobody waiting for it.

        The first prompt makes what is made on demand, and shows that the model can be computed.
        """
        params = SamplingParams(max_tokens=min(2, info.max_model_len - 1))
        self._ask(AddSequence(_WARM_UP_ID, [min(2, info.vocab_size - 1)], params))
        is_finished = False
        while not is_finished:
            message = await self._receive()
            if message is None:
                raise EngineUnavailable("The engine process ended at its first token.")
            assert isinstance(message, StepOutput)
            for output in message.outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise EngineUnavailable("The engine can't compute a first token.")
                is_finished = is_finished or output.finish_reason is not None
        self._is_due = False

    async def _supervise(self) -> None:
        """Read until the process is gone, then replace it; for as long as the server lives."""
        pause_s = 0.0
        while True:
            started = time.monotonic()
            await self._read()
            self._is_ready = False
            self._last_heard = time.monotonic()
            what = "hung" if self._is_hung else "stopped unexpectedly"
            logger.error("the engine process %s; starting it again", what)
            self._fail_streams(f"The engine {what} and is being restarted.")
            has_proved = time.monotonic() - started > PROVEN_S
            pause_s = 0.0 if has_proved else pause_s
            pause_s = await self._restart(pause_s)

    async def _read(self) -> None:
        """Hand out what the engine sends, until it is gone."""
        try:
            while (message := await self._receive()) is not None:
                assert isinstance(message, StepOutput)
                self._take(message)
            self._on_step(_NOTHING)
        except Exception:
            # Our own mistake, but streams must not wait for ever for nobody to read.
            logger.exception("what the engine sent could not be taken")

    async def _restart(self, pause_s: float) -> float:
        """Replace the process, after a pause and after a longer one whenever that fails; returns
        the pause before the next one, should it not last."""
        while True:
            await self._reap()
            await asyncio.sleep(pause_s)
            pause_s = min(max(1.0, 2 * pause_s), MAX_RESTART_PAUSE_S)
            self.num_restarts += 1
            try:
                self._spawn()
                await self._load()
                return pause_s
            except (EngineUnavailable, ConfigError, OSError) as error:
                logger.error("engine restart failed, next try in %.0f s: %s", pause_s, error)
            except Exception:
                # Our own mistake; giving up would leave a server that never gets ready.
                logger.exception("engine restart failed, next try in %.0f s", pause_s)

    async def _receive(self) -> FromEngine | None:
        """The next message, or None once the process is gone and has nothing left to say."""
        assert self._child is not None
        message = await self._child.receive(self._look)
        if message is not None:
            self._last_heard = time.monotonic()
            self._silent_s = 0.0
        return message

    def _look(self) -> None:
        """End the process if it has been silent for too long, which it never is while it works, or
        has been loading for too long."""
        if not self._is_ready:
            self._look_at_loading()
        # Summed up look by look, not read off a clock: while this process was stopped, the engine
        # may have been stopped too.
        self._silent_s = self._silent_s + LOOK_S if self._is_due else 0.0
        if self._info is None or self._is_hung:
            return
        timeout_s = hang_timeout_s(self._config, self._info)
        if 0 < timeout_s <= self._silent_s:
            assert self._child is not None
            logger.error("the engine has said nothing for %.0f s; ending it", self._silent_s)
            self._is_hung = True
            self._child.kill()

    def _look_at_loading(self) -> None:
        assert self._child is not None
        self._loading_s += LOOK_S
        doing = "computing a first token" if self._is_due else "loading the model"
        if 0 < self._config.engine_ready_timeout <= self._loading_s:
            flag = "--engine-ready-timeout"
            logger.error(
                "the engine isn't ready after %.0f s (%s), but %s; ending it",
                *(self._loading_s, flag, doing),
            )
            self._child.kill()
        elif self._loading_s % LOADING_NOTICE_S == 0:
            logger.info("the engine isn't ready after %.0f s, but %s", self._loading_s, doing)

    def _take(self, step: StepOutput) -> None:
        self._on_step(step.stats)
        for output in step.outputs:
            # A stream that isn't there was ended by us; the engine hears of it a step later.
            if stream := self._streams.get(output.request_id):
                stream.put_nowait(output)
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
        self._is_due = bool(self._streams)

    def _fail_streams(self, message: str) -> None:
        for stream in self._streams.values():
            stream.put_nowait(EngineUnavailable(message))
        self._streams.clear()

    def _ask(self, message: ToEngine) -> None:
        """Send what the engine answers, with a step or with its state."""
        assert self._child is not None
        if not self._is_due:
            self._is_due, self._last_heard = True, time.monotonic()
        self._child.send(message)

    def _abandon(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._context.destroy(linger=0)

    async def _reap(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.close()
