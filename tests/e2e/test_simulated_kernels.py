"""The engine on its Triton kernels, under the interpreter, gives the tokens of the CPU path.

Every kernel of a step takes part, with tensors as the engine makes them; the watch over each launch
refuses accesses out of bounds, races and reads of memory that nothing wrote.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from simulator.watch import watched

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.decode_graphs import DecodeGraphs
from bezel.engine.sampling_params import SamplingParams
from bezel.kernels.jit import triton_on_cpu

SHAPES = ["E2B", "E4B", "12B", "26B-A4B", "31B", "shared-k-eq-v-window-5", "gemma3"]
# Of `PROMPT_LENGTHS`: inside windows and pages, at their edge, and beyond both.
PROMPTS = (2, 10, 14)
NUM_OUTPUT_TOKENS = 4
GREEDY = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0)


def make_engine(path: Path, **settings: Any) -> Engine:
    return Engine(
        EngineConfig(
            model=str(path),
            dtype="float32",
            device="cpu",
            kv_cache_memory_bytes=8 << 20,
            **settings,
        )
    )


@pytest.mark.parametrize("tiny", SHAPES, indirect=True)
def test_tokens_equal_those_of_the_cpu_path(tiny: Any) -> None:
    prompts = [tiny.prompts[i] for i in PROMPTS]
    engine = make_engine(tiny.path, long_prefill_token_threshold=24)
    with triton_on_cpu(), watched() as watch:
        answers = engine.generate(prompts, GREEDY)
    assert answers == [tiny.answers[i][:NUM_OUTPUT_TOKENS] for i in PROMPTS]
    assert watch.num_launches > NUM_OUTPUT_TOKENS * len(engine.runner.model_config.layers)


@pytest.mark.parametrize("tiny", ["26B-A4B"], indirect=True)
def test_idle_rows_of_a_replayed_step_touch_nothing(tiny: Any) -> None:
    """Three sequences in a step recorded for four; page 0, where a row that stores at its idle
    inputs' zeros would do so, is lent to nobody and stays NaN."""
    prompts = [tiny.prompts[i] for i in PROMPTS]
    engine = make_engine(tiny.path)
    runner, layout = engine.runner, engine.runner.layout
    runner.kv_cache.arena.fill_(torch.nan)
    engine.pool._free_sectors.remove(0)
    with triton_on_cpu(), watched():
        runner.decode_graphs = DecodeGraphs(
            runner._hidden, layout, [4], runner.max_model_len, runner.device, capture=lambda c: c
        )
        answers = engine.generate(prompts, GREEDY)
    assert answers == [tiny.answers[i][:NUM_OUTPUT_TOKENS] for i in PROMPTS]
    first_sector = runner.kv_cache.arena[: layout.sector_bytes // runner.dtype.itemsize]
    assert first_sector.isnan().all() and not runner.kv_cache.arena.isnan().all()
