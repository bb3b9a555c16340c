"""What is found in the prefix cache equals what would be computed: same tokens, same logits."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
PAGE = 64


class RecordingEngine(Engine):
    """Keeps the logits of every draw, and counts the tokens it computed before them."""

    def __init__(self, path: Any, device: str, **settings: Any) -> None:
        sizes = dict(kv_cache_memory_bytes=64 << 20, block_size=PAGE // 4)
        defaults: dict[str, Any] = dict(dtype="float32", **sizes)
        super().__init__(EngineConfig(model=str(path), device=device, **(defaults | settings)))
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.num_prefilled = 0
        self.num_preemptions = 0
        run = self.runner.run

        def recording_run(step: Any) -> Any:
            logits_NV, prompt_logprobs = run(step)
            self.num_preemptions += step.num_preemptions
            self.num_prefilled += sum(s.num_tokens for s in step.sequences if s.is_prefill)
            for sequence, logits_V in zip(step.sampled, logits_NV, strict=True):
                self.logits.setdefault(sequence.request_id, []).append(logits_V.clone().cpu())
            return logits_NV, prompt_logprobs

        self.runner.run = recording_run  # type: ignore[method-assign]


@pytest.fixture
def compare(tiny: Any, device: str) -> Callable[..., Any]:
    """An engine with the cache beside one without; `run` checks that they agree."""

    class Pair:
        def __init__(self, **settings: Any) -> None:
            self.cold = RecordingEngine(tiny.path, device, enable_prefix_caching=False, **settings)
            self.warm = RecordingEngine(tiny.path, device, **settings)

        def run(self, prompts: list[list[int]], params: Any = GREEDY) -> list[list[int]]:
            self.cold.logits.clear()
            self.warm.logits.clear()
            answers = self.cold.generate(prompts, params)
            self.warm.num_prefilled = 0
            assert self.warm.generate(prompts, params) == answers
            for name, logits in self.cold.logits.items():
                warm = torch.stack(self.warm.logits[name])
                torch.testing.assert_close(warm, torch.stack(logits), atol=1e-4, rtol=0)
            pool = self.warm.pool
            pool.check_integrity()
            assert pool.used == pool.idle
            return answers

    return Pair


# The others add nothing to what is taken in and given up.
few = pytest.mark.parametrize("tiny", ["E2B", "26B-A4B", "window-5"], indirect=True)


def text(seed: int, num_tokens: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(3, 90) for _ in range(num_tokens)]


@pytest.mark.parametrize("length", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 6, 2 * PAGE + 1])
def test_turns_of_a_chat(compare: Any, length: int) -> None:
    """Each turn computes what is new, and a page at most of what was said before."""
    pair = compare()
    history: list[int] = []
    for turn in range(4):
        new = text(turn, length if turn == 0 else 20 + turn)
        (answer,) = pair.run([history + new])
        # Of the turn before, the last token of the answer was never computed.
        before = len(history) - 1 if history else 0
        resumed = before // PAGE * PAGE
        assert pair.warm.num_prefilled <= len(history) + len(new) - resumed
        history += new + answer
    assert pair.warm.scheduler.sharing.num_hit_tokens >= 3 * ((length - 1) // PAGE * PAGE)


@few
def test_the_same_again(compare: Any) -> None:
    pair = compare()
    for length in (1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 40):
        prompt = text(length, length)
        for _ in range(3):
            pair.run([prompt])
        assert pair.warm.num_prefilled == (length - 1) % PAGE + 1


def test_branches(compare: Any) -> None:
    """The third that begins alike resumes where the second has branched off."""
    pair = compare()
    start = text(0, 2 * PAGE + 10)
    others = [start + text(10 + i, 90) for i in range(5)]
    for i, prompt in enumerate(others):
        pair.run([prompt])
        if i >= 2:
            assert pair.warm.num_prefilled == len(prompt) - 2 * PAGE
    pair.run([*others[::-1], start, [*start, 5]])


@few
@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_many_at_once_in_chunks(compare: Any, chunk: int) -> None:
    pair = compare(long_prefill_token_threshold=chunk, max_num_batched_tokens=120, max_num_seqs=16)
    start = text(0, 70)
    prompts = [start[: 10 * (i % 8)] + text(i % 5, 60 + 13 * i) for i in range(12)]
    for _ in range(2):
        pair.run(prompts)
        prompts = [prompt + text(99, 30) for prompt in prompts[::-1]]
    assert pair.warm.scheduler.sharing.num_hit_tokens > 0


@few
@pytest.mark.parametrize("budget", [150, 4000])
def test_a_beginning_that_comes_many_times_at_once(compare: Any, budget: int) -> None:
    """It is computed once, whether it takes a step or several."""
    pair = compare(max_num_batched_tokens=budget, max_num_seqs=16)
    start = text(0, 5 * PAGE + 3)
    prompts = [start + text(10 + i, 20 + i) for i in range(6)]
    pair.run(prompts)
    once = sum(map(len, prompts)) - (len(prompts) - 1) * 5 * PAGE
    assert pair.warm.num_prefilled == once


@few
def test_under_pressure(compare: Any, tiny: Any, device: str) -> None:
    """Hardly more room than the longest needs: pages are evicted, sequences preempted."""
    layout = RecordingEngine(tiny.path, device).runner.layout
    num_sectors = layout.num_sectors(layout.peak_pages(330)) + 2
    arena_bytes = num_sectors * layout.sector_bytes
    pair = compare(kv_cache_memory_bytes=arena_bytes, max_model_len=320, block_size=16)
    drawn = random.Random(1)
    chats = [text(i, 20 + 15 * i) for i in range(5)]
    for _ in range(4):
        chosen = drawn.sample(range(5), 4)
        answers = pair.run([chats[i] for i in chosen], SamplingParams(max_tokens=60, temperature=0))
        for i, answer in zip(chosen, answers, strict=True):
            chats[i] = (chats[i] + answer + text(i, 9))[:250]
    assert pair.warm.scheduler.sharing.cache.num_evicted > 0
    assert pair.warm.num_preemptions > 0
