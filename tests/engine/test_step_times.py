"""What the engine tells of itself: how long a sequence waited, and where a step's time went."""

import os
from itertools import count
from pathlib import Path

import pytest

from bezel.engine import core
from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.messages import AddSequence, FinishReason
from bezel.engine.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=2, temperature=0.0)


@pytest.fixture
def engine(small_checkpoint: Path) -> Engine:
    """One that computes one sequence at a time, in chunks of 16 tokens at most."""
    return Engine(
        EngineConfig(
            model=str(small_checkpoint),
            dtype="float32",
            device="cpu",
            kv_cache_memory_bytes=32 << 20,
            max_num_seqs=1,
            long_prefill_token_threshold=16,
        )
    )


def waits(engine: Engine) -> list[dict[str, float]]:
    """Of each step, who was told to have waited for it."""
    steps = []
    while engine.has_work:
        outputs = engine.step().outputs
        steps.append(
            {o.request_id: o.queue_seconds for o in outputs if o.queue_seconds is not None}
        )
    return steps


def test_a_sequence_is_told_once_how_long_it_waited(engine: Engine) -> None:
    engine.add(AddSequence("a", [3] * 40, PARAMS))
    engine.add(AddSequence("b", [4] * 5, PARAMS))
    # Three chunks and a second token for a, then two steps for b.
    steps = waits(engine)
    assert [set(told) for told in steps] == [{"a"}, set(), set(), set(), {"b"}, set()]
    assert 0 <= steps[0]["a"] < steps[4]["b"]


def test_one_that_ends_while_it_waits_is_forgotten(engine: Engine) -> None:
    engine.add(AddSequence("a", [3] * 5, PARAMS))
    engine.add(AddSequence("b", [4] * 5, PARAMS))
    engine.finish("b", FinishReason.ABORT)
    assert [set(told) for told in waits(engine)] == [{"a"}, set()]
    engine.add(AddSequence("b", [4] * 5, PARAMS))
    assert [set(told) for told in waits(engine)] == [{"b"}, set()]


def test_where_the_time_of_a_step_goes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks whenever it is read."""
    ticks = count()
    monkeypatch.setattr(core.time, "perf_counter", lambda: float(next(ticks)))
    engine.add(AddSequence("a", [3] * 5, PARAMS))
    stats = engine.step().stats
    assert (stats.schedule_seconds, stats.model_seconds, stats.step_seconds) == (2.0, 1.0, 4.0)
    report = engine.report().stats
    assert (report.schedule_seconds, report.model_seconds, report.step_seconds) == (0.0, 0.0, 0.0)


def test_log_lines_that_were_lost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "num_dropped_lines", lambda: 7)
    assert engine.report().stats.num_dropped_log_lines == 7


def test_the_start_is_told(engine: Engine) -> None:
    info = engine.info
    assert info.pid == os.getpid()
    assert set(info.startup_seconds) == {"weights", "warm_up"}
    assert min(info.startup_seconds.values()) > 0
    assert (info.local_page_size, info.global_page_size) == (8, 32)
    assert info.gpu_memory_bytes == 0
