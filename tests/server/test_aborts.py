"""Sequences that end early are counted by why and how far they had come; requests by their size."""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from bezel.engine.errors import BezelError, EngineUnavailable
from bezel.engine.messages import FinishReason, SequenceOutput
from bezel.engine.sampling_params import SamplingParams
from bezel.server.errors import DeadlineExceeded, ShuttingDown
from bezel.server.event_loop import INTERVAL_S, watch_lag
from bezel.server.generation import TextRequest, collect, generating
from bezel.server.parsing.parser import TextParser
from bezel.server.state import ServerState

pytestmark = pytest.mark.anyio


@pytest.fixture
def request_for(tokenizer: Any) -> Any:
    def make(number: int = 0, prompt_ids: list[int] | None = None) -> TextRequest:
        return TextRequest(
            request_id=f"r-{number}",
            prompt_ids=prompt_ids or [1, 2],
            params=SamplingParams(max_tokens=8),
            parser=TextParser(tokenizer),
        )

    return make


def counted(state: ServerState, name: str) -> dict[tuple[str, ...], float]:
    """Values of labels → count, without those that are zero."""
    text = state.metrics.render()[0].decode()
    found = re.findall(rf"^bezel_{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    values = {}
    for labels, count in found:
        pairs = re.findall(r'(\w+)="(\w+)"', labels)
        key = tuple(value for label, value in pairs if label != "model_name")
        values[key] = float(count)
    return {labels: count for labels, count in values.items() if count}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "client"),
        (DeadlineExceeded(1), "deadline"),
        (ShuttingDown(), "shutdown"),
    ],
)
async def test_ended_from_outside(
    state: ServerState, engine: Any, request_for: Any, error: BezelError | None, reason: str
) -> None:
    engine.script = [[65], asyncio.Event()]
    async with generating(state, [request_for()]) as generation:
        deltas = generation.deltas()
        await anext(deltas)
        if error is not None:
            generation.fail(error)
            with pytest.raises(type(error)):
                await anext(deltas)
    assert counted(state, "request_aborts_total") == {("decode", reason): 1}


@pytest.mark.parametrize(
    ("failure", "reason"), [(EngineUnavailable("x"), "engine"), (FinishReason.ERROR, "error")]
)
async def test_failed_with_all_of_their_request(
    state: ServerState, engine: Any, request_for: Any, failure: Any, reason: str
) -> None:
    engine.scripts = [[[65], failure], [asyncio.Event()]]
    with pytest.raises(BezelError):
        await collect(state, [request_for(0), request_for(1)])
    aborts = counted(state, "request_aborts_total")
    assert aborts == {("decode", reason): 1, ("waiting", reason): 1}
    assert counted(state, "request_success_total") == {("error",): 1, ("abort",): 1}


async def test_a_reader_that_is_too_slow(
    state: ServerState, engine: Any, request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bezel.server.generation._MAX_PENDING", 3)
    engine.script = [[65]] * 10
    async with generating(state, [request_for()]):
        while not engine.ended:
            await asyncio.sleep(0)
    assert counted(state, "request_aborts_total") == {("decode", "slow_reader"): 1}


async def test_the_engine_tells_when_it_begins(
    state: ServerState, engine: Any, request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def generate(
        request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[SequenceOutput, None]:
        yield SequenceOutput(request_id=request_id, token_ids=[], queue_seconds=0.25)
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(engine, "generate", generate)
    async with generating(state, [request_for()]) as generation:
        await begun.wait()
        # There is nothing to tell a client yet.
        assert await anext(generation.deltas(idle_s=0)) is None
    assert counted(state, "request_aborts_total") == {("prefill", "client"): 1}
    assert counted(state, "request_queue_time_seconds_sum") == {(): 0.25}


async def test_requests_count_their_longest_answer(
    state: ServerState, engine: Any, request_for: Any
) -> None:
    long = [[65, 66, 67], FinishReason.STOP]
    engine.scripts = [[[65], FinishReason.STOP], long, [[65], FinishReason.STOP], long]
    prompts = [[1, 2], [1, 2, 3]]
    requests = [request_for(number, prompts[number // 2]) for number in range(4)]
    await collect(state, requests)
    # Two answers to each of two prompts; the tokens include the one that ends them.
    assert counted(state, "request_params_n_sum") == {(): 2}
    assert counted(state, "request_params_n_count") == {(): 1}
    assert counted(state, "request_max_num_generation_tokens_sum") == {(): 4}
    assert counted(state, "request_params_max_tokens_sum") == {(): 32}


async def test_event_loop_lag() -> None:
    now = 100.0
    lags: list[float] = []
    late = iter([0.0, 0.5, -0.001])

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds + next(late)

    with pytest.raises(RuntimeError):  # the iterator's end
        await watch_lag(lags.append, clock=lambda: now, sleep=sleep)
    assert lags == pytest.approx([0.0, 0.5, 0.0])
    assert now == pytest.approx(100 + 3 * INTERVAL_S + 0.499)
