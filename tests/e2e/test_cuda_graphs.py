"""Decode steps on a GPU: recorded ones give the tokens of others, none waits, and memory stays.

What is compared bit by bit has products of the same size on both sides: a library may pick another
algorithm, which rounds differently, for three sequences than for the four of a recorded step.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.decode_graphs import DecodeGraphs, capture_sizes
from bezel.engine.messages import AddSequence
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        os.environ["TRITON_INTERPRET"] == "1", reason="needs compiled kernels: TRITON_INTERPRET=0"
    ),
]

SHAPES = ["E2B", "12B", "26B-A4B", "31B", "real-head-dims", "gemma3"]
MAX_NUM_SEQS = 16
GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
MIXED = [
    GREEDY,
    SamplingParams(max_tokens=10, temperature=1.0, top_k=64, top_p=0.95, seed=1),
    SamplingParams(max_tokens=10, temperature=1.0, min_p=0.01, seed=2),
    SamplingParams(max_tokens=10, temperature=0.7, presence_penalty=1.0, min_tokens=4, seed=3),
    SamplingParams(max_tokens=10, temperature=1.0, top_p=0.9, logit_bias={7: 1.5}, seed=4),
    SamplingParams(max_tokens=10, temperature=0.0, logprobs=5, prompt_logprobs=2),
    SamplingParams(
        max_tokens=10,
        temperature=0.0,
        thinking_budget=ThinkingBudget(num_tokens=3, open_id=7, close_id=8, is_open=True),
    ),
]


def make_engine(path: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = dict(
        model=str(path),
        device="cuda",
        dtype="bfloat16",
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=MAX_NUM_SEQS,
    )
    return Engine(EngineConfig(**(defaults | settings)))


def mixed(num_seqs: int) -> list[SamplingParams]:
    return [MIXED[i % len(MIXED)] for i in range(num_seqs)]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tiny", SHAPES, indirect=True)
def test_replayed_steps_compute_what_the_same_steps_do_unrecorded(tiny: Any) -> None:
    recorded = make_engine(tiny.path)
    unrecorded = make_engine(tiny.path, enforce_eager=True)
    runner = unrecorded.runner
    assert recorded.runner.decode_graphs is not None and runner.decode_graphs is None
    runner.decode_graphs = DecodeGraphs(
        runner._hidden,
        runner.layout,
        capture_sizes(MAX_NUM_SEQS),
        runner.max_model_len,
        runner.device,
        capture=lambda compute: compute,
    )
    for num_seqs in range(1, MAX_NUM_SEQS + 1):
        prompts, params = tiny.prompts[:num_seqs], mixed(num_seqs)
        assert recorded.generate(prompts, params) == unrecorded.generate(prompts, params)


@pytest.mark.parametrize("tiny", SHAPES, indirect=True)
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [("bfloat16", capture_sizes(MAX_NUM_SEQS)), ("float32", range(1, MAX_NUM_SEQS + 1))],
)
def test_tokens_equal_those_of_eager_steps(tiny: Any, dtype: str, sizes: list[int]) -> None:
    """In float32 with idle rows too: there, roundings are too small to change a token."""
    recorded = make_engine(tiny.path, dtype=dtype)
    eager = make_engine(tiny.path, dtype=dtype, enforce_eager=True)
    for num_seqs in sizes:
        prompts = tiny.prompts[-num_seqs:]
        assert recorded.generate(prompts, GREEDY) == eager.generate(prompts, GREEDY)


@pytest.mark.parametrize("tiny", ["26B-A4B"], indirect=True)
def test_two_hundred_replays_allocate_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny.path)
    graphs = engine.runner.decode_graphs
    assert graphs is not None
    replay, num_replays = graphs.run, 0

    def counting_replay(step: Any) -> Tensor:
        nonlocal num_replays
        num_replays += 1
        return replay(step)

    monkeypatch.setattr(graphs, "run", counting_replay)
    for i, params in enumerate(MIXED):
        params = SamplingParams(max_tokens=300, temperature=params.temperature, top_k=params.top_k)
        engine.add(AddSequence(f"request-{i}", tiny.prompts[i], params))

    def memory_after(num_steps: int) -> tuple[int, int]:
        for _ in range(num_steps):
            engine.step()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before, num_before = memory_after(20), num_replays
    assert memory_after(200) == before
    assert num_replays == num_before + 200


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("tiny", ["E2B", "26B-A4B"], indirect=True)
def test_nothing_waits_before_the_tokens_are_fetched(tiny: Any, enforce_eager: bool) -> None:
    engine = make_engine(tiny.path, enforce_eager=enforce_eager)
    for i, params in enumerate(MIXED):
        engine.add(AddSequence(f"request-{i}", tiny.prompts[i], params))
    engine.step()
    num_steps = 0
    while engine.has_work:
        step = engine.scheduler.schedule()
        with torch.inference_mode(), waiting_is_an_error():
            draws = engine.sampler.draw(engine.runner.run(step)[0], step.sampled)
            with pytest.raises(RuntimeError, match="synchronizing"):
                draws.fetch()
        engine.scheduler.commit(step, draws.fetch()[0])
        num_steps += 1
    assert num_steps == GREEDY.max_tokens - 1
