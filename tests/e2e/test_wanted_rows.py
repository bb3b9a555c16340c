"""After the last keys and values only rows that somebody wants are computed, with transformers'
results.

Rows are counted where they enter a layer.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.messages import AddSequence, TokenLogprobs
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledStep
from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.jit import triton_on_cpu

ATOL = 1e-4
# Windows of 32, 5 and 9; layers that share, or none; the last to own is global, or local.
SHAPES = ["E2B", "E4B", "shared-k-eq-v-window-5", "three-share-kv", "gemma3-ends-local"]
all_shapes = pytest.mark.parametrize("tiny", SHAPES, indirect=True)


class CountingEngine(Engine):
    """Keeps for each step how many rows it has, how many are wanted and how many reached each
    layer; and by request the logits of all draws and all log-probabilities of prompts."""

    def __init__(self, tiny: Any, device: str, **settings: Any) -> None:
        defaults: dict[str, Any] = dict(
            model=str(tiny.path), dtype="float32", device=device, kv_cache_memory_bytes=8 << 20
        )
        super().__init__(EngineConfig(**(defaults | settings)))
        layers = self.runner.model_config.layers
        self.num_owning = sum(layer.owns_kv for layer in layers)
        self.num_others = len(layers) - self.num_owning
        self.steps: list[tuple[int, int, list[int]]] = []
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self._reached = [0] * len(layers)
        for i, layer in enumerate(self.runner.model.layers):
            layer.register_forward_pre_hook(self._counter(i))
        self._run = self.runner.run
        self.runner.run = self._counting_run  # type: ignore[method-assign]

    def _counter(self, i: int) -> Any:
        def count(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._reached[i] += len(arguments[0])

        return count

    def _counting_run(self, step: ScheduledStep) -> Any:
        self._reached = [0] * len(self._reached)
        logits_NV, prompt_logprobs = self._run(step)
        self.steps.append((step.num_tokens, wanted_rows(step), self._reached))
        for sequence, logits_V in zip(step.sampled, logits_NV, strict=True):
            self.logits.setdefault(sequence.request_id, []).append(logits_V.clone().cpu())
        return logits_NV, prompt_logprobs

    def answer(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
        """All together; the tokens of each."""
        for kept in (self.steps, self.logits, self.prompt_logprobs):
            kept.clear()
        answers: list[list[int]] = [[] for _ in prompts]
        for i, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            self.add(AddSequence(str(i), prompt, own))
        while self.has_work:
            for output in self.step().outputs:
                answers[int(output.request_id)] += output.token_ids
                entries = self.prompt_logprobs.setdefault(output.request_id, [])
                entries += output.prompt_logprobs
        return answers


def wanted_rows(step: ScheduledStep) -> int:
    """Of prompts whose log-probabilities are wanted all, of others that of a draw."""
    num_rows = 0
    for scheduled in step.sequences:
        sequence = scheduled.sequence
        first = max(scheduled.start, sequence.num_once_computed)
        is_asked = sequence.params.prompt_logprobs is not None
        if is_asked and first < min(scheduled.end, sequence.num_prompt_tokens - 1):
            num_rows += scheduled.num_tokens
        else:
            num_rows += scheduled.end == sequence.num_tokens
    return num_rows


def params_of(asks: bool, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=0.0, prompt_logprobs=1 if asks else None
    )


def check(
    engine: CountingEngine,
    tiny: Any,
    prompts: list[list[int]],
    asking: list[bool],
    max_tokens: int = 3,
) -> None:
    """Rows, logits and log-probabilities of prompts that are computed together."""
    answers = engine.answer(prompts, [params_of(asks, max_tokens) for asks in asking])
    for num_rows, num_wanted, reached in engine.steps:
        # The last layer to own keys and values has stored them by the time it counts.
        assert reached[: engine.num_owning - 1] == [num_rows] * (engine.num_owning - 1)
        assert reached[engine.num_owning - 1 :] == [num_wanted] * (engine.num_others + 1)
    for i, (prompt, answer, asks) in enumerate(zip(prompts, answers, asking, strict=True)):
        expected_LV = tiny.logits(prompt + answer)
        computed_NV = torch.stack(engine.logits[str(i)])
        expected_NV = expected_LV[len(prompt) - 1 : -1]
        torch.testing.assert_close(computed_NV, expected_NV, atol=ATOL, rtol=0)
        assert answer == expected_NV.argmax(-1).tolist()
        own = [entry.logprob for entry in engine.prompt_logprobs[str(i)]]
        logprobs_LV = expected_LV.log_softmax(-1)
        told = enumerate(prompt[1:] if asks else [])
        expected = [logprobs_LV[n, token].item() for n, token in told]
        assert own == pytest.approx(expected, abs=ATOL)
    engine.pool.check_integrity()
    assert engine.pool.used == engine.pool.idle


@all_shapes
def test_chunks_that_end_no_prompt_reach_no_sharing_layer(tiny: Any, device: str) -> None:
    engine = CountingEngine(tiny, device, long_prefill_token_threshold=64)
    check(engine, tiny, [tiny.prompts[-1]], [False])
    rows = [(reached[0], reached[-1]) for _, _, reached in engine.steps]
    assert rows == [(64, 0), (64, 0), (22, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("tiny", "kernels"),
    [("E2B", "plain"), *((name, "native") for name in SHAPES if name != "E4B")],
    indirect=["tiny"],
)
def test_lengths_around_windows_and_pages(tiny: Any, device: str, kernels: str) -> None:
    """The last query sees a position that nothing keeps after the step."""
    if kernels == "plain" and device != "cpu":
        pytest.skip("a CPU's")
    engine = CountingEngine(tiny, device, enable_prefix_caching=False)
    text = tiny.prompts[-1]
    window = engine.runner.layout.window
    lengths = [*range(window - 1, window + 4), *range(46, 50), 63, 64, 95, 143]
    with plain_torch() if kernels == "plain" else nullcontext():
        for length in lengths:
            check(engine, tiny, [text[:length]], [False])


@all_shapes
def test_prompts_with_logprobs_stay_whole(tiny: Any, device: str) -> None:
    """Beside prompts that end, prompts that don't, and decodes."""
    engine = CountingEngine(tiny, device, long_prefill_token_threshold=40, max_num_seqs=5)
    prompts = [tiny.prompts[i] for i in (14, 11, 2, 12, 9, 7)]
    check(engine, tiny, prompts, [False, True, False, True, False, False])
    assert any(32 < wanted < rows for rows, wanted, _ in engine.steps)


@pytest.mark.parametrize("tiny", ["shared-k-eq-v-window-5"], indirect=True)
def test_simulated_kernels_with_a_chunk_of_each_kind(tiny: Any) -> None:
    pytest.importorskip("triton")
    from simulator.watch import watched

    engine = CountingEngine(tiny, "cpu", long_prefill_token_threshold=5)
    prompts = [tiny.prompts[i] for i in (3, 2, 4, 0)]
    with triton_on_cpu(), watched():
        check(engine, tiny, prompts, [False, True, False, False], max_tokens=1)
    assert [(rows, wanted) for rows, wanted, _ in engine.steps] == [(15, 6), (1, 1)]


@pytest.mark.parametrize("tiny", ["E2B", "shared-k-eq-v-window-5"], indirect=True)
def test_whatever_comes_together(tiny: Any, device: str) -> None:
    """Texts that begin alike, in any chunks, preempted now and then; pages are few."""
    layout = CountingEngine(tiny, device).runner.layout
    num_sectors = layout.num_sectors(layout.peak_pages(160)) * 3
    arena_bytes = num_sectors * layout.sector_bytes
    engine = CountingEngine(tiny, device, max_model_len=160, kv_cache_memory_bytes=arena_bytes)
    drawn, text = random.Random(0), tiny.prompts[-1]
    for _ in range(8):
        engine.scheduler._max_chunk = drawn.randrange(1, 90)
        engine.scheduler._token_budget = drawn.randrange(20, 200)
        prompts = [text[: drawn.randrange(1, 150)] for _ in range(drawn.randrange(1, 7))]
        with preempting(engine, drawn.randrange(8)):
            check(engine, tiny, prompts, [drawn.random() < 0.3 for _ in prompts])
    assert engine.scheduler.sharing.num_hit_tokens > 0


@contextmanager
def preempting(engine: CountingEngine, number: int) -> Iterator[None]:
    """Before step `number`, if there is one, the last to run gives its pages back."""
    schedule, num_steps = engine.scheduler.schedule, 0

    def preempting_schedule() -> ScheduledStep:
        nonlocal num_steps
        num_steps += 1
        if num_steps == number and engine.scheduler.running:
            engine.scheduler._preempt(engine.scheduler.running[-1])
        return schedule()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.scheduler, "schedule", preempting_schedule)
        yield
