"""`benchmarks/overload.py`: a crowd before a server of known capacity, and what is made of it."""

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import overload
from overload import Crowd, Phase, Report, Returns, phase_of, to_text

from bezel.server.benchmarking.measure import Measurement, Message
from bezel.server.benchmarking.settings import ServeBenchmark

BENCHMARK = ServeBenchmark(slo_ttft=1.0, slo_itl=1.0)


def answered(ended_s: float, ttft_s: float = 0.5, sent_s: float = 0.0) -> Measurement:
    times = [sent_s + ttft_s, sent_s + ttft_s + 0.1]
    return Measurement(sent_s=sent_s, ended_s=ended_s, chunk_times_s=times, text="ab")


def refused(ended_s: float, retry_after_s: int | None = 3, sent_s: float = 0.0) -> Measurement:
    return Measurement(
        sent_s=sent_s, ended_s=ended_s, error="HTTP 429", retry_after_s=retry_after_s
    )


def test_only_what_ends_within_the_window_counts() -> None:
    measurements = [
        answered(9.9),
        *(answered(10.0), answered(15.0), answered(19.9, ttft_s=2.0)),
        *(refused(12.0), refused(12.5)),
        answered(20.0),
    ]
    phase = phase_of(BENCHMARK, measurements, 10.0, 20.0)
    assert phase.goodput == pytest.approx(0.2), "two within the objectives, in ten seconds"
    assert (phase.num_asked, phase.num_answered) == (5, 3)
    assert phase.errors == {"HTTP 429": 2}
    assert phase.ttft_s is not None
    assert phase.ttft_s.max == pytest.approx(2.0)


def test_every_tenth_comes_back_when_told_to() -> None:
    now = 0.0
    waits: list[float] = []

    async def ask(messages: Sequence[Message]) -> Measurement:
        if messages[0]["content"] == "again":
            return answered(now + 1, sent_s=now)
        return refused(now, retry_after_s=7, sent_s=now)

    async def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += seconds

    async def run() -> Crowd:
        crowd = Crowd(ask, sleep)
        for number in range(1, 21):
            message = {"role": "user", "content": str(number)}
            assert (await crowd.ask([message])).error == "HTTP 429"
        return crowd

    crowd = asyncio.run(run())
    assert waits == [7, 7]
    assert [measured.sent_s for measured in crowd.returned] == [7.0, 14.0]
    crowd.returned.append(answered(20.0, sent_s=14.0))
    returns = crowd.returns(14.0, phase_of(BENCHMARK, [answered(1.0), refused(1.0)], 0, 10))
    assert returns == Returns(
        num_during=1,
        num_let_in_during=0,
        num_after=2,
        num_let_in_after=1,
        share_let_in_of_all=0.5,
    )


def test_a_peak_is_of_those_that_end_after_the_ramp() -> None:
    """Of eight at once four are answered, and none of them in less than 10 ms."""

    async def peak(num_prompts: int, seconds: float) -> Phase:
        places = asyncio.Semaphore(4)
        clock = time.perf_counter

        async def ask(messages: Sequence[Message]) -> Measurement:
            sent_s = clock()
            async with places:
                await asyncio.sleep(0.01)
            return answered(clock(), ttft_s=clock() - sent_s, sent_s=sent_s)

        benchmark = ServeBenchmark(slo_ttft=60.0, num_prompts=num_prompts, input_len=1)
        return await overload.measure_peak(ask, benchmark, 8, seconds)

    phase = asyncio.run(peak(10_000, 0.4))
    assert phase.seconds == pytest.approx(0.3)
    assert 0 < phase.goodput <= 4 / 0.01 + 4 / 0.3
    with pytest.raises(SystemExit, match="8 requests are too few for 60 s"):
        asyncio.run(peak(8, 60.0))


def test_the_report() -> None:
    phase = phase_of(BENCHMARK, [answered(1.0), answered(2.0), refused(3.0)], 0.0, 10.0)
    peak = Phase(
        seconds=10, goodput=0.25, num_asked=3, num_answered=3, ttft_s=phase.ttft_s, errors={}
    )
    report = Report(
        at_once=8,
        peak=peak,
        peak_after=replace(peak, goodput=0.15),
        offered=1.0,
        overload=phase,
        returns=Crowd(lambda messages: asyncio.sleep(0)).returns(0.0, phase),  # type: ignore[arg-type, return-value]
        bytes_before=10**9,
        bytes_after=10**9,
    )
    text = to_text(report)
    assert "peak       0.15 requests/s afterwards" in text
    assert "goodput    0.20 requests/s, 100.0% of the peaks' mean" in text
    assert "admitted   2 of 3; first token after 0.50 s (p50)" in text
    assert "refused    429: 1, 503: 0, otherwise: none" in text
