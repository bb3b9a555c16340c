"""Replayed decode steps: static inputs, idle rows, and the tokens of the engine without graphs.

Recording itself needs a GPU. Here "recording" keeps the computation and "replaying" runs it again,
which shows whatever depends on how a step's inputs get into the static tensors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.engine.batch import Batch
from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.decode_graphs import DecodeGraphs, capture_sizes
from bezel.engine.sampling_params import SamplingParams
from bezel.kernels.kv_pages import NO_SLOT

SIZES = [1, 2, 4, 8]
PARAMS = SamplingParams(max_tokens=40, temperature=0.0)
PROMPTS = [[7 + i, 11, 13 * i + 1, *range(i)] for i in range(11)]


class Recorded:
    """Stands in for CUDA's capture; `replays` counts how often each recording ran again."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        index = len(self.replays)
        self.replays.append(0)

        def replay() -> Tensor:
            self.replays[index] += 1
            return compute()

        return replay


def make_engine(path: Path, recorded: Recorded | None, **settings: Any) -> Engine:
    engine = Engine(
        EngineConfig(
            model=str(path),
            dtype="float32",
            device="cpu",
            kv_cache_memory_bytes=8 << 20,
            **settings,
        )
    )
    runner = engine.runner
    if recorded is not None:
        runner.decode_graphs = DecodeGraphs(
            runner._hidden, runner.layout, SIZES, runner.max_model_len, runner.device, recorded
        )
    return engine


def test_sizes_end_at_the_limit() -> None:
    assert capture_sizes(1) == [1]
    assert capture_sizes(5) == [1, 2, 4, 5]
    assert capture_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert capture_sizes(128)[-4:] == [80, 96, 112, 128]


def test_tokens_equal_those_without_graphs(small_checkpoint: Path) -> None:
    """Eleven sequences that start and end at different times pass through every size."""
    params = [
        SamplingParams(max_tokens=3 * i + 2, temperature=0.0, ignore_eos=True) for i in range(11)
    ]
    recorded = Recorded()
    engine = make_engine(small_checkpoint, recorded, max_num_seqs=8, max_num_batched_tokens=16)
    expected = make_engine(small_checkpoint, None, max_num_seqs=8).generate(PROMPTS, params)
    assert engine.generate(PROMPTS, params) == expected
    assert all(recorded.replays)
    assert engine.pool.used == engine.pool.idle
    engine.pool.check_integrity()


def test_rows_left_over_idle(small_checkpoint: Path) -> None:
    """Three sequences in four rows, after four: the fourth row is as if it had never been used."""
    seen: list[Batch] = []
    engine = make_engine(small_checkpoint, Recorded())
    forward = engine.runner.model.forward

    def watching(batch: Batch, kv_cache: Any) -> Tensor:
        seen.append(batch)
        return forward(batch, kv_cache)

    engine.runner.model.forward = watching  # type: ignore[method-assign]
    lengths = [SamplingParams(max_tokens=n, temperature=0.0) for n in (5, 5, 5, 3)]
    engine.generate(PROMPTS[:4], lengths)
    last = seen[-1]
    assert last.num_decodes == 4
    assert last.seq_lens_S.tolist()[:3] == [len(prompt) + 4 for prompt in PROMPTS[:3]]
    assert last.seq_lens_S[3] == 0
    assert last.local.slot_mapping_T[3] == last.global_.slot_mapping_T[3] == NO_SLOT
    assert last.token_ids_T[3] == last.positions_T[3] == 0


def test_inputs_stay_where_the_graph_reads_them(small_checkpoint: Path) -> None:
    addresses = set()
    engine = make_engine(small_checkpoint, Recorded())
    forward = engine.runner.model.forward

    def watching(batch: Batch, kv_cache: Any) -> Tensor:
        if not batch.has_chunks:
            addresses.add(
                tuple(
                    tensor.data_ptr()
                    for tensor in (
                        batch.token_ids_T,
                        batch.positions_T,
                        batch.seq_lens_S,
                        batch.local.page_table_SP,
                        batch.local.slot_mapping_T,
                        batch.global_.page_table_SP,
                        batch.global_.slot_mapping_T,
                    )
                )
            )
        return forward(batch, kv_cache)

    engine.runner.model.forward = watching  # type: ignore[method-assign]
    engine.generate(PROMPTS[3:6], PARAMS)
    assert len(addresses) == 1


@pytest.mark.parametrize("num_seqs, is_taken", [(8, True), (9, False)])
def test_only_steps_that_fit(small_checkpoint: Path, num_seqs: int, is_taken: bool) -> None:
    recorded = Recorded()
    engine = make_engine(small_checkpoint, recorded)
    engine.generate(PROMPTS[:num_seqs], PARAMS)
    assert any(recorded.replays) is is_taken


def test_prompt_chunks_of_one_token_are_not_taken(small_checkpoint: Path) -> None:
    """Single tokens all right, but no token is drawn after them."""
    recorded = Recorded()
    engine = make_engine(small_checkpoint, recorded, long_prefill_token_threshold=1)
    plain = make_engine(small_checkpoint, None)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    assert engine.generate([PROMPTS[9]], params) == plain.generate([PROMPTS[9]], params)
    assert sum(recorded.replays) == 1


def test_tables_of_static_width_serve_the_longest_sequence(small_checkpoint: Path) -> None:
    engine = make_engine(small_checkpoint, Recorded(), max_model_len=300)
    plain = make_engine(small_checkpoint, None, max_model_len=300)
    prompt = torch.arange(280).remainder(250).tolist()
    params = SamplingParams(max_tokens=20, temperature=0.0)
    assert engine.generate([prompt], params) == plain.generate([prompt], params)
