"""How long steps take, computed, not measured: decoding at several batches, prompts in chunks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bezel.engine.config import EngineConfig
from bezel.engine.planning.step_cost import Load, StepCost

DECODE_CONTEXT = 8192
BATCHES = (1, 8, 64)
PROMPTS = (8192, 32_768, 131_072)
SPREAD = 1.3  # an estimate may be wrong by this factor, either way


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One decode step of `num_seqs` sequences with `num_tokens` of context each, or all steps of a
    prompt of `num_tokens`. `floor_s` is the device's best; `estimated_s` is a range of what
    kernels are likely to reach. `bound` takes `bound_share` of the floor: reading "weights",
    "experts" or "KV", or "compute"."""

    phase: str
    num_seqs: int
    num_tokens: int
    floor_s: float
    estimated_s: tuple[float, float]
    bound: str
    bound_share: float
    tokens_per_s_at_most: float


def plan_decoding(cost: StepCost, context: int, most: int) -> tuple[StepPlan, ...]:
    """At each of `BATCHES` below `most`, and at `most`."""
    batches = [*(batch for batch in BATCHES if batch < most), most]
    return tuple(_decode(cost, context, batch) for batch in batches if batch > 0)


def plan_prompts(cost: StepCost, config: EngineConfig, longest: int) -> tuple[StepPlan, ...]:
    """Of each of `PROMPTS` that is no longer than `longest`, or of the longest."""
    lengths = [n for n in PROMPTS if n <= longest] or [longest]
    chunk = config.long_prefill_token_threshold or config.max_num_batched_tokens
    chunk = min(chunk, config.max_num_batched_tokens)
    return tuple(_prompt(cost, length, chunk) for length in lengths)


def _decode(cost: StepCost, context: int, batch: int) -> StepPlan:
    load = cost.load()
    for _ in range(batch):
        load.add(context - 1, context, True)
    return _plan("decode", batch, context, cost, [load], num_tokens_made=batch)


def _prompt(cost: StepCost, length: int, chunk: int) -> StepPlan:
    loads = []
    for start in range(0, length, chunk):
        load = cost.load()
        end = min(start + chunk, length)
        load.add(start, end, end == length)
        loads.append(load)
    return _plan("prefill", 1, length, cost, loads, num_tokens_made=length)


def _plan(
    phase: str,
    num_seqs: int,
    num_tokens: int,
    cost: StepCost,
    loads: Sequence[Load],
    num_tokens_made: int,
) -> StepPlan:
    floor_s = sum(cost.floor_seconds(load) for load in loads)
    estimate_s = sum(cost.seconds(load) for load in loads)
    bounds = _bounds(cost, loads)
    bound = max(bounds, key=bounds.__getitem__)
    return StepPlan(
        phase=phase,
        num_seqs=num_seqs,
        num_tokens=num_tokens,
        floor_s=floor_s,
        estimated_s=(max(floor_s, estimate_s / SPREAD), estimate_s * SPREAD),
        bound=bound,
        bound_share=bounds[bound] / floor_s,
        tokens_per_s_at_most=num_tokens_made / floor_s,
    )


def _bounds(cost: StepCost, loads: Iterable[Load]) -> dict[str, float]:
    """Seconds of the floor by what bounds them."""
    seconds: dict[str, float] = {}
    for load in loads:
        for part in cost.parts(load):
            kind = "compute" if part.is_compute_bound else part.kind
            seconds[kind] = seconds.get(kind, 0) + part.floor_s
    return seconds
