"""The experts' MLPs against loops over tokens, and against transformers' Gemma 4."""

import math

import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from bezel.kernels.moe_mlp import moe_mlp
from bezel.kernels.moe_route import route


def naive_mlp(x_D: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
    width = len(gate_up_FD) // 2
    hidden = []
    for f in range(width):
        gate = float(gate_up_FD[f].double() @ x_D.double())
        up = float(gate_up_FD[width + f].double() @ x_D.double())
        gelu = 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        hidden.append(gelu * up)
    return down_DF.double() @ torch.tensor(hidden, dtype=torch.float64)


def random_experts(num_experts: int, dim: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_experts)
    gate_up_EFD = torch.randn(num_experts, 2 * width, dim, generator=generator)
    return gate_up_EFD, torch.randn(num_experts, dim, width, generator=generator)


@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 1), (6, 3), (16, 8)])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_token_by_token(num_experts: int, top_k: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    gate_up_EFD, down_EDF = random_experts(num_experts, 8, 5)
    x_TD = torch.randn(num_tokens, 8, generator=generator)
    chosen_TA = torch.stack(
        [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)]
    )
    y_TXD = moe_mlp(x_TD, None, chosen_TA.int(), gate_up_EFD, down_EDF, None, None)
    expected = [
        torch.stack([naive_mlp(x_D, gate_up_EFD[e], down_EDF[e]) for e in chosen.tolist()])
        for x_D, chosen in zip(x_TD, chosen_TA, strict=True)
    ]
    torch.testing.assert_close(y_TXD.double(), torch.stack(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_dense", [1, 3])
def test_dense_parts_add_up_to_the_dense_mlp(num_dense: int) -> None:
    generator = torch.Generator().manual_seed(num_dense)
    gate_up_EFD, down_EDF = random_experts(4, 8, 5)
    dense_gate_up_FD = torch.randn(2 * num_dense * 5, 8, generator=generator)
    dense_down_DF = torch.randn(8, num_dense * 5, generator=generator)
    x_routed_TD, x_dense_TD = torch.randn(2, 3, 8, generator=generator)
    chosen_TA = torch.tensor([[1, 2], [3, 0], [2, 1]], dtype=torch.int32)
    weights = (gate_up_EFD, down_EDF)
    y_TXD = moe_mlp(x_routed_TD, x_dense_TD, chosen_TA, *weights, dense_gate_up_FD, dense_down_DF)
    assert torch.equal(y_TXD[:, :2], moe_mlp(x_routed_TD, None, chosen_TA, *weights, None, None))
    assert y_TXD.shape == (3, 2 + num_dense, 8)
    expected = [naive_mlp(x_D, dense_gate_up_FD, dense_down_DF) for x_D in x_dense_TD]
    dense_TD = y_TXD[:, 2:].double().sum(1)
    torch.testing.assert_close(dense_TD, torch.stack(expected), atol=1e-4, rtol=1e-5)


def test_weights_of_experts_nobody_chose_are_not_read() -> None:
    gate_up_EFD, down_EDF = random_experts(4, 8, 5)
    gate_up_EFD[[0, 3]] = torch.nan
    down_EDF[[0, 3]] = torch.nan
    chosen_TA = torch.tensor([[1, 2], [2, 1]], dtype=torch.int32)
    y_TXD = moe_mlp(torch.ones(2, 8), None, chosen_TA, gate_up_EFD, down_EDF, None, None)
    one, two = (naive_mlp(torch.ones(8), gate_up_EFD[e], down_EDF[e]) for e in (1, 2))
    expected = torch.stack((torch.stack((one, two)), torch.stack((two, one))))
    torch.testing.assert_close(y_TXD.double(), expected, atol=1e-4, rtol=1e-5)


def test_weighted_sum_equals_transformers_in_bfloat16() -> None:
    config = Gemma4TextConfig(
        num_hidden_layers=6,
        hidden_size=32,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=12,
    )
    config._experts_implementation = "eager"
    oracle = Gemma4TextExperts(config).bfloat16()
    generator = torch.Generator().manual_seed(5)
    for parameter in oracle.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    x_TD = torch.randn(20, 32, generator=generator).bfloat16()
    scores_TE = torch.randn(20, 8, generator=generator)
    chosen_TA, weights_TA = route(scores_TE, torch.ones(8), 2)
    with torch.no_grad():
        y_TXD = moe_mlp(x_TD, None, chosen_TA, oracle.gate_up_proj, oracle.down_proj, None, None)
        expected_TD = oracle(x_TD, chosen_TA.long(), weights_TA)
    assert y_TXD.dtype == torch.bfloat16
    y_TD = (y_TXD.float() * weights_TA[:, :, None]).sum(1)
    # One unit in bfloat16's last place.
    torch.testing.assert_close(y_TD, expected_TD.float(), atol=1e-3, rtol=2.0**-7)
