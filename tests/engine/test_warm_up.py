"""What is launched after the engine has started was compiled before.

This file is also the program that the test runs, in a process whose kernels are compiled and not
interpreted. Triton tells it of each kernel it is about to compile, and is kept from it.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bezel.engine.batch import Batch
from bezel.engine.config import EngineConfig
from bezel.engine.kv_cache import KVCache
from bezel.engine.kv_layout import KVLayout
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import build_model
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.sampler import Sampler
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget
from bezel.engine.scheduler import Scheduler
from bezel.engine.sequence import Sequence
from bezel.engine.warm_up import warm_up_model, warm_up_sampling

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton for this system", allow_module_level=True)

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
META, ARENA_BYTES, VOCAB_SIZE = torch.device("meta"), 100 << 30, 262_144
PROMPTS = [[2048], [1], [2], [16, 3000], [31_000], [1] * 5 + [200], [60] * 40, [700, 5, 1300]]


def run_steps(config: ModelConfig) -> Iterator[None]:
    """Warm up, then compute the first steps of prompts."""
    model = build_model(config, torch.bfloat16, META)
    model.after_loading()
    layout = KVLayout.for_model(config, torch.bfloat16.itemsize, 16)
    kv_cache = KVCache(config, layout, ARENA_BYTES, torch.bfloat16, META)
    settings = EngineConfig()

    def logits(batch: Batch) -> torch.Tensor:
        hidden_TD = model(batch, kv_cache)
        if batch.sampled_rows_N is not None:
            hidden_TD = hidden_TD[batch.sampled_rows_N]
        logits_NV: torch.Tensor = model.compute_logits(hidden_TD[:1])
        return logits_NV

    warm_up_model(logits, layout, settings.max_num_batched_tokens, 32_768, META)
    yield
    for lengths in PROMPTS:
        scheduler = Scheduler(settings, PagePool(layout, ARENA_BYTES))
        for i, num_tokens in enumerate(lengths):
            scheduler.add(sequence(str(i), num_tokens, SamplingParams(max_tokens=9), layout))
        for _ in range(4):
            step = scheduler.schedule()
            logits(Batch.build(step, layout, META))
            scheduler.commit(step, [9] * len(step.sampled))


def run_draws(config: ModelConfig) -> Iterator[None]:
    """Warm up, then draw from all sorts of rows, alone and together."""
    layout = KVLayout.for_model(config, torch.bfloat16.itemsize, 16)
    sampler, choose = Sampler([5], VOCAB_SIZE), random.Random(0).choice
    warm_up_sampling(sampler, layout, VOCAB_SIZE, META)
    yield
    budget = ThinkingBudget(num_tokens=0, open_id=7, close_id=8, is_open=True)
    for num_rows in [1] * 50 + [2, 3, 7, 16, 64, 128] * 3:
        rows = [
            SamplingParams(
                max_tokens=9,
                temperature=choose([0.0, 0.7, 1.0]),
                top_k=choose([0, 0, 1, 64, 2000]),
                top_p=choose([1.0, 1.0, 0.9]),
                min_p=choose([0.0, 0.1]),
                min_tokens=choose([0, 1]),
                repetition_penalty=choose([1.0, 1.0, 1.5]),
                logprobs=choose([None, 0, 1, 2, 5, 16, 20]),
                thinking_budget=choose([None, None, budget]),
            )
            for _ in range(num_rows)
        ]
        sequences = [sequence("", choose([1, 20]), params, layout) for params in rows]
        sampler.draw(torch.empty(num_rows, VOCAB_SIZE, device=META), sequences)


def sequence(name: str, num_tokens: int, params: SamplingParams, layout: KVLayout) -> Sequence:
    return Sequence(name, [9] * num_tokens, params, 1, frozenset({1}), PageTables(layout))


@torch.inference_mode()
def main() -> None:
    """For each config.json of standard input, how many kernels both warm-ups compile, and which
    are compiled later."""
    from aot.driver import compiling_for
    from triton import knobs

    compiled: dict[str, tuple[str, dict[str, Any]]] = {}

    def note(*, fn: Any, key: str, compile: dict[str, Any], **_: Any) -> bool:
        names = fn.jit_function.arg_names
        constants = {names[i]: value for (i,), value in compile["constants"].items()}
        compiled.setdefault(f"{fn.name} {key}", (fn.name, constants))
        return True

    for name, raw in json.load(sys.stdin).items():
        config = ModelConfig.from_hf(raw)
        if not config.per_layer_input_size:  # layers repeat, without sharing KV
            config = replace(config, layers=config.layers[:6])
        for run in (run_steps, run_draws):
            compiled.clear()
            with compiling_for("sm_90"):
                knobs.runtime.jit_cache_hook = note
                phases = run(config)
                next(phases)
                num_early = len(compiled)
                list(phases)
            print(json.dumps([name, run.__name__, num_early, [*compiled.values()][num_early:]]))


def test_nothing_is_compiled_after_the_start(real_configs: dict[str, Any], tmp_path: Path) -> None:
    """Prompts and contexts of all lengths, few and many sequences, every kind of draw."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(BENCHMARKS)}
    configs = {name: real_configs[name] for name in ("E2B", "26B-A4B")}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(configs),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(configs)
    for name, run, num_early, late in found:
        assert num_early >= 10 and late == [], f"{name}, {run}"


if __name__ == "__main__":
    main()
