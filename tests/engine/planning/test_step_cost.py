"""Totals of a step against loops over its tokens, and seconds against the parts they sum up.

That the parts are what kernels move and compute is tested in tests/test_roofline.py.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.device import PRESETS, Device
from bezel.engine.planning.model import PlannedModel
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.planning.step_cost import Load, StepCost

SLOW = Device(
    name="slow",
    memory_bytes=10**9,
    bytes_per_s=1e9,
    flops_per_s=1e11,
    memory_efficiency=0.5,
    compute_efficiency=0.25,
    step_overhead_s=3.0,
)


def planned(name: str, **options: str) -> PlannedModel:
    return PlannedModel.of(name, ModelConfig.from_hf(PUBLISHED[name]), **options)  # type: ignore[arg-type]


@given(
    window=st.integers(1, 40),
    chunks=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60), st.booleans()), max_size=4),
)
@settings(max_examples=100)
def test_totals_are_those_of_each_token(window: int, chunks: list[tuple[int, int, bool]]) -> None:
    load = Load(window)
    local_keys = local_pairs = global_keys = global_pairs = 0
    for start, length, is_sampled in chunks:
        load.add(start, start + length, is_sampled)
        seen = [range(max(0, n - window + 1), n + 1) for n in range(start, start + length)]
        local_pairs += sum(map(len, seen))
        local_keys += len(set().union(*seen))
        global_pairs += sum(n + 1 for n in range(start, start + length))
        global_keys += start + length
    assert (load.local_keys, load.local_pairs) == (local_keys, local_pairs)
    assert (load.global_keys, load.global_pairs) == (global_keys, global_pairs)
    assert load.num_tokens == sum(length for _, length, _ in chunks)
    assert load.num_logits == sum(is_sampled for _, _, is_sampled in chunks)


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-4-E2B", "gemma-4-26B-A4B"])
@pytest.mark.parametrize("device", [SLOW, PRESETS["b200"]], ids=lambda device: device.name)
def test_seconds_are_the_parts_slowed_down(name: str, device: Device) -> None:
    cost = StepCost(planned(name), device)
    load = cost.load()
    for start, end, is_sampled in ((0, 700, False), (5000, 5001, True), (900, 901, True)):
        load.add(start, end, is_sampled)
    parts = cost.parts(load)
    assert cost.floor_seconds(load) == pytest.approx(sum(part.floor_s for part in parts))
    slowed = sum(
        max(part.memory_s / device.memory_efficiency, part.compute_s / device.compute_efficiency)
        for part in parts
    )
    assert cost.seconds(load) == pytest.approx(device.step_overhead_s + slowed)
    assert sum(part.num_bytes for part in parts if part.kind == "experts") > 0 or name[-1] != "A4B"


def test_without_logits_no_head_is_read() -> None:
    cost = StepCost(planned("gemma-4-E2B"), SLOW)
    with_logits, without = cost.load(), cost.load()
    with_logits.add(10, 11, True)
    without.add(10, 11, False)
    head = 262_144 * 1536 * 2 / 1e9
    assert cost.floor_seconds(with_logits) - cost.floor_seconds(without) == pytest.approx(head)


def test_formats_of_weights_and_of_pages_count_apart() -> None:
    def kv_and_weights(**options: str) -> tuple[float, float]:
        cost = StepCost(planned("gemma-4-E2B", **options), SLOW)
        load = cost.load()
        load.add(8191, 8192, True)
        parts = cost.parts(load)
        kv = sum(part.num_bytes for part in parts if part.kind == "KV")
        return kv, next(part.num_bytes for part in parts if part.name == "MLP")

    kv, mlp = kv_and_weights()
    assert kv_and_weights(kv_cache_dtype="fp8") == (kv / 2, mlp)
    assert kv_and_weights(dtype="float32") == (2 * kv, 2 * mlp)
