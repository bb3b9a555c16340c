"""Experts from packed weights against the reference that takes them one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.cpu.launch import Arena, Recording
from bezel.kernels.cpu.moe import dispatch, gather, scatter
from bezel.kernels.cpu.program import Program
from bezel.kernels.moe_combine import combine_experts
from bezel.kernels.moe_dispatch import dispatch_reference
from bezel.kernels.moe_route import route
from bezel.kernels.packed import PackedWeight, WeightFormat, pack_weight, stack_packed
from bezel.kernels.packed_moe import packed_moe_mlp

DIM, NUM_EXPERTS, TOP_K = 96, 6, 2
FORMATS = list(WeightFormat)


def experts(format: WeightFormat, width: int) -> tuple[PackedWeight, PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(NUM_EXPERTS, 2 * width, DIM, generator=generator) * DIM**-0.5
    down = torch.randn(NUM_EXPERTS, DIM, width, generator=generator) * width**-0.5
    first, second = (
        stack_packed(pack_weight(w, format) for w in stack) for stack in (gate_up, down)
    )
    return first, second


def rows(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and the experts chosen, of which the last is idle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, DIM, generator=generator).bfloat16()
    scores = torch.rand(num_tokens, NUM_EXPERTS - 1, generator=generator)
    return x, scores.topk(TOP_K).indices.int()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize("num_tokens", [1, 3, 40, 300])
def test_experts(format: WeightFormat, width: int, num_tokens: int) -> None:
    weights = experts(format, width)
    x, chosen = rows(num_tokens)
    with plain_torch():
        expected = packed_moe_mlp(x, chosen, *weights)
    y = packed_moe_mlp(x, chosen, *weights)
    assert (y - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours(format: WeightFormat) -> None:
    weights = experts(format, 96)
    x, chosen = rows(300)
    together = packed_moe_mlp(x, chosen, *weights)
    for some in (slice(0, 1), slice(7, 12), slice(299, 300)):
        assert torch.equal(packed_moe_mlp(x[some], chosen[some], *weights), together[some])


def test_idle_experts_are_not_read() -> None:
    weights = experts(WeightFormat.BFLOAT16, 96)
    for weight in weights:
        weight.data[-1] = 0xFF  # NaN
    assert packed_moe_mlp(*rows(40), *weights).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 4), st.integers(1, 20), st.data())
def test_dispatch(
    num_tokens: int, num_experts: int, top_k: int, block_rows: int, data: st.DataObject
) -> None:
    experts = st.integers(0, num_experts - 1)
    size = num_tokens * top_k
    chosen = torch.tensor(data.draw(st.lists(experts, min_size=size, max_size=size)))
    chosen_TA = chosen.int().view(num_tokens, top_k)
    slots_N, blocks_M3 = dispatch(chosen_TA, num_experts, block_rows)
    expected_N, expected_M3 = dispatch_reference(chosen_TA, num_experts, block_rows)
    assert torch.equal(slots_N, expected_N) and torch.equal(blocks_M3, expected_M3)


@pytest.mark.parametrize("num_tokens", [1, 50, 3000])
def test_rows_come_back_to_their_slots(num_tokens: int) -> None:
    x = torch.randn(num_tokens, 24)[:, :20]
    order = torch.randperm(2 * num_tokens).int()
    sorted_rows = gather(x, order, 2)
    assert torch.equal(sorted_rows, x[order // 2])
    assert torch.equal(scatter(sorted_rows, order), x.repeat_interleave(2, 0))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_program_takes_other_experts_each_time(format: WeightFormat, num_tokens: int) -> None:
    weights = experts(format, 96)
    scale = torch.rand(NUM_EXPERTS).bfloat16()
    norms = torch.rand(4, DIM) + 0.5

    def compute(x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        chosen, shares = route(scores, scale, TOP_K)
        y = packed_moe_mlp(x, chosen, *weights)
        out, normed = combine_experts(y, shares, x, *norms[:3], x, 1e-6, None, norms[3])
        assert normed is not None
        return out, normed

    x = torch.empty(num_tokens, DIM, dtype=torch.bfloat16)
    scores = torch.empty(num_tokens, NUM_EXPERTS, dtype=torch.bfloat16)
    with Recording(Arena(1 << 24)) as recording:
        recorded = compute(x, scores)
    program = Program(recording.launches)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(x.shape, generator=generator))
        scores.copy_(torch.randn(scores.shape, generator=generator))
        program.run()
        for of_program, eager in zip(recorded, compute(x, scores), strict=True):
            assert torch.equal(of_program, eager)
