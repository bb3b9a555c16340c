"""What the client does about processes that don't start, don't speak, or don't last."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from bezel.engine import client as client_module
from bezel.engine.child import LOOK_S
from bezel.engine.client import EngineClient
from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError, EngineUnavailable
from bezel.engine.messages import (
    AddSequence,
    EngineInfo,
    FinishReason,
    FromEngine,
    PrefixStats,
    SequenceOutput,
    StartFailed,
    StepOutput,
    StepStats,
)
from bezel.engine.patience import hang_timeout_s
from bezel.engine.sampling_params import SamplingParams

INFO = EngineInfo(
    max_model_len=100,
    vocab_size=10,
    dtype="float32",
    device="cuda:0",
    num_parameters=1,
    eos_token_ids=[],
    kv_cache_bytes=1,
    local_pages_total=1,
    global_pages_total=1,
    local_page_bytes=1,
    global_page_bytes=1,
)
STATS = StepStats(
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
LOOK = object()
PARAMS = SamplingParams(max_tokens=5)


def step(request_id: str, reason: FinishReason | None = None) -> StepOutput:
    output = SequenceOutput(request_id=request_id, token_ids=[1], finish_reason=reason)
    stats = msgspec.structs.replace(STATS, num_running=1)
    return StepOutput(outputs=[output], stats=stats)


class Child:
    """A process that answers as told, and is silent for as long as it is told to be."""

    def __init__(self, first: FromEngine | None, warm_up: list[Any]) -> None:
        self.said: asyncio.Queue[Any] = asyncio.Queue()
        self.said.put_nowait(first)
        self._warm_up = warm_up
        self.is_killed = False

    def send(self, message: Any) -> None:
        if isinstance(message, AddSequence) and message.request_id == "warm-up":
            for item in self._warm_up:
                self.said.put_nowait(item)

    async def receive(self, look: Callable[[], None]) -> Any:
        while (item := await self.said.get()) is LOOK:
            look()
        return item

    def kill(self) -> None:
        if not self.is_killed:
            self.is_killed = True
            self.said.put_nowait(None)

    async def join(self, timeout_s: float) -> bool:
        return True

    async def close(self) -> None:
        self.kill()


def good(*warm_up: Any) -> Child:
    return Child(INFO, [*warm_up, step("warm-up"), step("warm-up", FinishReason.LENGTH)])


class Processes:
    """Children to come, one after the other; the last one is good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.coming: list[Child] = []
        self.started: list[Child] = []
        self.pauses_s: list[float] = []
        self.stats: list[StepStats] = []
        wait = asyncio.sleep

        async def pause(seconds: float) -> None:
            if seconds >= 1:
                self.pauses_s.append(seconds)
            await wait(0)

        monkeypatch.setattr(client_module, "EngineChild", self._start)
        monkeypatch.setattr(client_module.asyncio, "sleep", pause)

    def _start(self, context: Any, address: str) -> Child:
        self.started.append(self.coming.pop(0) if self.coming else good())
        return self.started[-1]

    @asynccontextmanager
    async def client(self, **settings: Any) -> AsyncIterator[EngineClient]:
        client = EngineClient(EngineConfig(**settings), self.stats.append)
        try:
            async with asyncio.timeout(20):
                yield client
        finally:
            await client.shutdown()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_ready_means_that_a_token_was_had(processes: Processes) -> None:
    async def test() -> None:
        child = Child(INFO, [])
        processes.coming = [child]
        async with processes.client() as client:
            starting = asyncio.ensure_future(client.start())
            await until(child.said.empty)
            child.said.put_nowait(step("warm-up"))
            await until(child.said.empty)
            assert not client.is_ready
            child.said.put_nowait(step("warm-up", FinishReason.STOP))
            await starting
            assert client.is_ready and processes.stats == [] and client.step_age_s == 0

    asyncio.run(test())


@pytest.mark.parametrize("last", [step("warm-up", FinishReason.ERROR), None])
def test_no_token_no_start(processes: Processes, last: StepOutput | None) -> None:
    async def test() -> None:
        processes.coming = [Child(INFO, [last])]
        async with processes.client() as client:
            with pytest.raises(EngineUnavailable, match="first token"):
                await client.start()

    asyncio.run(test())


def test_restarts_are_tried_again_after_longer_and_longer_pauses(processes: Processes) -> None:
    async def test() -> None:
        processes.coming = [
            good(),
            Child(None, []),
            Child(StartFailed("no memory"), []),
            Child(INFO, [step("warm-up", FinishReason.ERROR)]),
            Child(STATS, []),  # our own mistake
        ]
        async with processes.client() as client:
            await client.start()
            processes.started[0].said.put_nowait(None)
            await until(lambda: len(processes.started) == 6 and client.is_ready)
            assert processes.pauses_s == [1, 2, 4, 8]
            assert client.num_restarts == 5

    asyncio.run(test())


def test_one_that_dies_again_and_again_is_not_started_at_once(processes: Processes) -> None:
    async def test() -> None:
        async with processes.client() as client:
            await client.start()
            for num in range(1, 8):
                processes.started[-1].said.put_nowait(None)
                await until(lambda num=num: len(processes.started) > num and client.is_ready)
            assert processes.pauses_s == [1, 2, 4, 8, 16, 30]

    asyncio.run(test())


def test_one_that_has_lasted_is_replaced_at_once(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PROVEN_S", 0.0)

    async def test() -> None:
        async with processes.client() as client:
            await client.start()
            for num in range(1, 4):
                processes.started[-1].said.put_nowait(None)
                await until(lambda num=num: len(processes.started) > num and client.is_ready)
            assert processes.pauses_s == []

    asyncio.run(test())


async def silence(child: Child, seconds: float) -> None:
    for _ in range(int(seconds / LOOK_S)):
        child.said.put_nowait(LOOK)
    await until(child.said.empty)


def test_silence_with_work_pending_is_a_hang(processes: Processes) -> None:
    async def test() -> None:
        async with processes.client(engine_hang_timeout=10) as client:
            await client.start()
            child = processes.started[0]
            await silence(child, 1000)  # nothing is due
            stream = client.generate("r", [1], PARAMS)
            asking = asyncio.ensure_future(anext(stream))
            await until(child.said.empty)
            await silence(child, 9)
            child.said.put_nowait(step("r"))
            assert (await asking).token_ids == [1]
            await silence(child, 9)
            assert not child.is_killed
            await silence(child, 1)
            assert child.is_killed
            with pytest.raises(EngineUnavailable, match=r"^The engine hung and is being restarted"):
                await anext(stream)
            assert processes.stats[-1].num_running == 0, "nothing runs any more"
            await until(lambda: client.is_ready)
            assert len(processes.started) == 2

    asyncio.run(test())


def test_silence_before_the_first_step_is_a_hang_too(processes: Processes) -> None:
    async def test() -> None:
        async with processes.client(engine_hang_timeout=10) as client:
            await client.start()
            asking = asyncio.ensure_future(anext(client.generate("r", [1], PARAMS)))
            await asyncio.sleep(0)
            await silence(processes.started[0], 10)
            with pytest.raises(EngineUnavailable, match="hung"):
                await asking

    asyncio.run(test())


def test_a_request_that_was_given_up_leaves_an_answer_due(processes: Processes) -> None:
    async def test() -> None:
        async with processes.client(engine_hang_timeout=10) as client:
            await client.start()
            child = processes.started[0]
            asking = asyncio.ensure_future(anext(client.generate("r", [1], PARAMS)))
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await silence(child, 5)
            assert client.step_age_s > 0
            child.said.put_nowait(StepOutput(outputs=[], stats=STATS))
            await until(child.said.empty)
            assert client.step_age_s == 0
            await silence(child, 100)
            assert not child.is_killed

    asyncio.run(test())


def test_loading_may_take_long_but_a_first_token_may_not(processes: Processes) -> None:
    async def test() -> None:
        slow = good()
        slow.said = asyncio.Queue()
        for item in [LOOK] * 1000 + [INFO]:
            slow.said.put_nowait(item)
        processes.coming = [slow, Child(INFO, [LOOK] * 11)]
        async with processes.client(engine_hang_timeout=10) as client:
            await client.start()
            slow.said.put_nowait(None)
            await until(lambda: len(processes.started) == 3 and client.is_ready)
            assert processes.started[1].is_killed

    asyncio.run(test())


def test_loading_has_a_limit_and_is_told_of(processes: Processes, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "bezel")

    async def test() -> None:
        stuck, hung = Child(None, []), Child(INFO, [LOOK] * 100)
        stuck.said = asyncio.Queue()
        processes.coming = [good(), stuck, hung]
        async with processes.client(engine_ready_timeout=150, engine_hang_timeout=0) as client:
            await client.start()
            processes.started[0].said.put_nowait(None)
            await until(lambda: len(processes.started) == 2)
            await silence(stuck, 149)
            assert not stuck.is_killed and not client.is_ready
            await silence(stuck, 1)
            assert stuck.is_killed
            await until(lambda: len(processes.started) == 3 and hung.said.empty())
            await silence(hung, 50)
            assert hung.is_killed
            await until(lambda: client.is_ready)

    asyncio.run(test())
    told = [record.getMessage() for record in caplog.records if "isn't ready" in record.msg]
    assert told == [
        "the engine isn't ready after 60 s, but loading the model",
        "the engine isn't ready after 120 s, but loading the model",
        "the engine isn't ready after 150 s (--engine-ready-timeout), but loading the model; "
        "ending it",
        "the engine isn't ready after 60 s, but computing a first token",
        "the engine isn't ready after 120 s, but computing a first token",
        "the engine isn't ready after 150 s (--engine-ready-timeout), but computing a first token; "
        "ending it",
    ]


@pytest.mark.parametrize("timeout_s", [1001, 0])
def test_within_its_limit_a_model_is_loaded(processes: Processes, timeout_s: int) -> None:
    async def test() -> None:
        slow = good()
        slow.said = asyncio.Queue()
        for item in [LOOK] * 1000 + [INFO]:
            slow.said.put_nowait(item)
        processes.coming = [slow]
        async with processes.client(engine_ready_timeout=timeout_s) as client:
            await client.start()
            assert client.is_ready

    asyncio.run(test())
    with pytest.raises(ConfigError, match="--engine-ready-timeout"):
        EngineConfig(engine_ready_timeout=-1)


def test_zero_waits_for_ever(processes: Processes) -> None:
    async def test() -> None:
        async with processes.client(engine_hang_timeout=0) as client:
            await client.start()
            asking = asyncio.ensure_future(anext(client.generate("r", [1], PARAMS)))
            await asyncio.sleep(0)
            await silence(processes.started[0], 10_000)
            assert not processes.started[0].is_killed
            asking.cancel()

    asyncio.run(test())


def test_a_large_model_on_a_cpu_is_given_time() -> None:
    config = EngineConfig(max_num_batched_tokens=2000, max_num_seqs=1)
    on_cpu = EngineInfo(
        **{name: getattr(INFO, name) for name in INFO.__struct_fields__}
        | {"device": "cpu", "num_parameters": 5_000_000_000}
    )
    assert hang_timeout_s(config, INFO) == 300
    assert hang_timeout_s(config, on_cpu) == 300 + 2 * 5e9 * 2000 / 50e9 == 700
    assert hang_timeout_s(EngineConfig(engine_hang_timeout=7), on_cpu) == 7
    with pytest.raises(ConfigError, match="--engine-hang-timeout"):
        EngineConfig(engine_hang_timeout=-1)
