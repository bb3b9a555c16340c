"""Experts from packed weights against the reference that takes them one by one."""

import pytest
import torch

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.packed import WeightFormat, pack_weight, stack_packed
from bezel.kernels.packed_moe import packed_moe_mlp


@pytest.mark.parametrize("format", list(WeightFormat))
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_experts(format: WeightFormat, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dim, width, num_experts, top_k = 64, 96, 6, 2
    gate_up = torch.randn(num_experts, 2 * width, dim, generator=generator) * dim**-0.5
    down = torch.randn(num_experts, dim, width, generator=generator) * width**-0.5
    weights = [stack_packed(pack_weight(w, format) for w in stack) for stack in (gate_up, down)]
    x = torch.randn(num_tokens, dim, generator=generator).bfloat16()
    scores = torch.rand(num_tokens, num_experts - 1, generator=generator)  # the last is idle
    chosen = scores.topk(top_k).indices.int()
    with plain_torch():
        expected = packed_moe_mlp(x, chosen, *weights)
    y = packed_moe_mlp(x, chosen, *weights)
    assert (y - expected).abs().max() <= 2e-2 * expected.abs().max()
    alone = packed_moe_mlp(x[:1], chosen[:1], *weights)
    assert torch.equal(alone, y[:1])
