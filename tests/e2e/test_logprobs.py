"""Log-probabilities equal log_softmax of transformers' logits, however they are computed."""

from typing import Any

import pytest
from torch import Tensor

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.messages import AddSequence, SequenceOutput, TokenLogprobs
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledStep

ATOL = 1e-4
MAX_TOKENS = 6
SHAPES = ["E2B", "26B-A4B", "shared-k-eq-v-window-5", "gemma3"]
pytestmark = pytest.mark.parametrize("tiny", SHAPES, indirect=True)

# Every combination of asking and not asking, of edits to the logits, and of ways to draw.
KINDS: list[dict[str, Any]] = [
    dict(logprobs=3, prompt_logprobs=2),
    dict(),
    dict(logprobs=20, repetition_penalty=2.0, presence_penalty=1.5),
    dict(prompt_logprobs=20, temperature=1.0, top_k=5, seed=1),
    dict(logprobs=0, prompt_logprobs=0, logit_bias={9: 30.0}),
    dict(logprobs=1, temperature=1.0, seed=2),
    dict(logprobs=5, prompt_logprobs=1, frequency_penalty=2.0, temperature=1.3, top_p=0.8, seed=3),
]


def make_engine(tiny: Any, device: str, **settings: Any) -> Engine:
    defaults: dict[str, Any] = dict(
        model=str(tiny.path), dtype="float32", device=device, kv_cache_memory_bytes=64 << 20
    )
    return Engine(EngineConfig(**(defaults | settings)))


def params_of(number: int, **changes: Any) -> SamplingParams:
    kind = dict(max_tokens=MAX_TOKENS, temperature=0.0) | KINDS[number % len(KINDS)]
    return SamplingParams(**(kind | changes))


def outputs_of(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams]
) -> list[list[SequenceOutput]]:
    """All together; the outputs of each."""
    for i, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        engine.add(AddSequence(str(i), prompt, own))
    outputs: list[list[SequenceOutput]] = [[] for _ in prompts]
    while engine.has_work:
        new = engine.step().outputs
        assert len({output.request_id for output in new}) == len(new)
        for output in new:
            outputs[int(output.request_id)].append(output)
    return outputs


def check(tiny: Any, engine: Engine) -> None:
    """All prompts together, each of another kind."""
    params = [params_of(i) for i in range(len(tiny.prompts))]
    outputs = outputs_of(engine, tiny.prompts, params)
    for prompt, own, pieces in zip(tiny.prompts, params, outputs, strict=True):
        check_one(tiny, prompt, own, pieces)


def check_one(
    tiny: Any, prompt: list[int], params: SamplingParams, outputs: list[SequenceOutput]
) -> None:
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    expected_LV = tiny.logits(prompt + token_ids).log_softmax(-1)
    first = next(i for i, output in enumerate(outputs) if output.token_ids)
    assert not any(output.prompt_logprobs for output in outputs[first + 1 :])
    for output in outputs:
        is_first = output.queue_seconds is not None
        assert output.token_ids or output.prompt_logprobs or is_first, "an output about nothing"
        assert len(output.logprobs) == (0 if params.logprobs is None else len(output.token_ids))
    if params.prompt_logprobs is not None:
        entries = [entry for output in outputs for entry in output.prompt_logprobs]
        check_entries(entries, expected_LV[: len(prompt) - 1], prompt[1:], params.prompt_logprobs)
    else:
        assert not any(output.prompt_logprobs for output in outputs)
    if params.logprobs is not None:
        entries = [entry for output in outputs for entry in output.logprobs]
        check_entries(entries, expected_LV[len(prompt) - 1 : -1], token_ids, params.logprobs)


def check_entries(
    entries: list[TokenLogprobs], expected_NV: Tensor, token_ids: list[int], num_top: int
) -> None:
    for entry, expected_V, token_id in zip(entries, expected_NV, token_ids, strict=True):
        assert entry.logprob == pytest.approx(expected_V[token_id].item(), abs=ATOL)
        assert len(entry.top_ids) == len({*entry.top_ids}) == num_top
        at_top = expected_V[entry.top_ids].tolist()
        assert entry.top_logprobs == pytest.approx(at_top, abs=ATOL)
        assert entry.top_logprobs == pytest.approx(
            expected_V.topk(num_top).values.tolist(), abs=ATOL
        )
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)


@pytest.mark.parametrize("chunk", [0, 1, 7, 64])
def test_sixteen_at_once_in_chunks(tiny: Any, device: str, chunk: int) -> None:
    check(tiny, make_engine(tiny, device, long_prefill_token_threshold=chunk))


def test_a_small_budget_mixes_chunks_and_decodes(tiny: Any, device: str) -> None:
    check(tiny, make_engine(tiny, device, max_num_batched_tokens=24, max_num_seqs=24))


def test_preempted_and_recomputed(tiny: Any, device: str) -> None:
    """In any phase, half-way through a prompt too, and some of them several times."""
    engine = make_engine(tiny, device, long_prefill_token_threshold=13)
    schedule, num_steps = engine.scheduler.schedule, 0

    def preempting_schedule() -> ScheduledStep:
        nonlocal num_steps
        running = engine.scheduler.running
        if running and num_steps < 20:
            engine.scheduler._preempt(running[num_steps * 7 % len(running)])
        num_steps += 1
        return schedule()

    engine.scheduler.schedule = preempting_schedule  # type: ignore[method-assign]
    check(tiny, engine)


def test_tokens_are_the_same_whether_or_not_anyone_asks(tiny: Any, device: str) -> None:
    engine = make_engine(tiny, device)
    params = [params_of(i) for i in range(len(tiny.prompts))]
    silent = [params_of(i, logprobs=None, prompt_logprobs=None) for i in range(len(tiny.prompts))]
    assert engine.generate(tiny.prompts, params) == engine.generate(tiny.prompts, silent)


def test_greedy_draws_the_likeliest(tiny: Any, device: str) -> None:
    params = [SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=1)] * 16
    for outputs in outputs_of(make_engine(tiny, device), tiny.prompts, params):
        for output in outputs:
            (entry,) = output.logprobs
            assert entry.top_ids == output.token_ids
            assert entry.top_logprobs == [entry.logprob]
