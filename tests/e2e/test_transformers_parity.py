"""Greedy tokens and logits equal transformers' on the same float32 weights, however they run."""

from typing import Any

import pytest
import torch

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.sampling_params import SamplingParams
from bezel.kernels.packed import PackedWeight

NUM_OUTPUT_TOKENS = 10
GREEDY = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0)
LOGITS_ATOL = 1e-4


class RecordingEngine(Engine):
    """Keeps the logits every sampled token was drawn from."""

    def __init__(self, path: Any, **settings: Any) -> None:
        defaults: dict[str, Any] = dict(
            model=str(path), dtype="float32", kv_cache_memory_bytes=64 << 20
        )
        super().__init__(EngineConfig(**(defaults | settings)))
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.num_preemptions = 0
        run = self.runner.run

        def recording_run(step: Any) -> Any:
            logits_NV, prompt_logprobs = run(step)
            self.num_preemptions += step.num_preemptions
            for sequence, logits_V in zip(step.sampled, logits_NV, strict=True):
                self.logits.setdefault(sequence.request_id, []).append(logits_V.clone().cpu())
            return logits_NV, prompt_logprobs

        self.runner.run = recording_run  # type: ignore[method-assign]


def assert_equal_to_transformers(engine: RecordingEngine, tiny: Any, chosen: list[int]) -> None:
    engine.logits.clear()
    answers = engine.generate([tiny.prompts[i] for i in chosen], GREEDY)
    assert answers == [tiny.answers[i] for i in chosen]
    for n, i in enumerate(chosen):
        prompt, answer = tiny.prompts[i], tiny.answers[i]
        expected = tiny.logits(prompt + answer)[len(prompt) - 1 : -1]
        torch.testing.assert_close(
            torch.stack(engine.logits[f"offline-{n}"]), expected, atol=LOGITS_ATOL, rtol=0
        )
    engine.pool.check_integrity()
    assert engine.pool.used == engine.pool.idle


def test_alone(tiny: Any, device: str) -> None:
    engine = RecordingEngine(tiny.path, device=device)
    for i in range(len(tiny.prompts)):
        assert_equal_to_transformers(engine, tiny, [i])


@pytest.mark.parametrize("chunk", [0, 1, 7, 64])
def test_sixteen_at_once_in_chunks(tiny: Any, device: str, chunk: int) -> None:
    engine = RecordingEngine(tiny.path, device=device, long_prefill_token_threshold=chunk)
    assert_equal_to_transformers(engine, tiny, list(range(16)))


def test_small_budget_mixes_chunks_and_decodes(tiny: Any, device: str) -> None:
    engine = RecordingEngine(tiny.path, device=device, max_num_batched_tokens=24, max_num_seqs=24)
    assert_equal_to_transformers(engine, tiny, list(range(15, -1, -1)))


def test_weights_that_are_stored_in_bfloat16(tiny_in_bfloat16: Any, device: str) -> None:
    """A model of float32 keeps them so, and computes in float32."""
    tiny = tiny_in_bfloat16
    engine = RecordingEngine(tiny.path, device=device, long_prefill_token_threshold=64)
    assert_equal_to_transformers(engine, tiny, list(range(16)))
    if device == "cpu":
        assert isinstance(engine.runner.model.layers[0].mlp.gate_up_proj.weight, PackedWeight)


def test_preempted_and_recomputed(tiny: Any, device: str) -> None:
    """An arena for hardly more than the longest sequence makes sixteen fight for it."""
    probe = RecordingEngine(tiny.path, device=device, block_size=16)
    layout = probe.runner.layout
    longest = layout.peak_pages(max(map(len, tiny.prompts)) + NUM_OUTPUT_TOKENS)
    arena_bytes = (layout.num_sectors(longest) + 1) * layout.sector_bytes
    engine = RecordingEngine(
        tiny.path,
        device=device,
        max_model_len=170,
        kv_cache_memory_bytes=arena_bytes,
        block_size=16,
    )
    assert_equal_to_transformers(engine, tiny, list(range(16)))
    assert engine.num_preemptions > 0
