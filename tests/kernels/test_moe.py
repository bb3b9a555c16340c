"""Routing and experts against loops over tokens, and against transformers' Gemma 4."""

import math

import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from bezel.kernels.moe import experts, route


def naive_route(
    scores: list[float], scales: list[float], top_k: int
) -> tuple[list[int], list[float]]:
    total = sum(math.exp(score) for score in scores)
    ranked = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
    probabilities = [math.exp(scores[e]) / total for e in ranked]
    weights = [
        p / sum(probabilities) * scales[e] for p, e in zip(probabilities, ranked, strict=True)
    ]
    return ranked, weights


def naive_expert(x_D: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
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
    gate_up = torch.randn(num_experts, 2 * width, dim, generator=generator)
    return gate_up, torch.randn(num_experts, dim, width, generator=generator)


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 1), (16, 2), (128, 8), (4, 4)])
def test_route(num_experts: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    scores_TE = torch.randn(10, num_experts, generator=generator) * 2
    scale_E = torch.rand(num_experts, generator=generator) + 0.5
    chosen_TA, weights_TA = route(scores_TE, scale_E, top_k)
    for t, scores in enumerate(scores_TE.tolist()):
        chosen, weights = naive_route(scores, scale_E.tolist(), top_k)
        assert chosen_TA[t].tolist() == chosen
        torch.testing.assert_close(weights_TA[t], torch.tensor(weights))


def test_top_1_weighs_its_expert_by_the_scale_alone() -> None:
    scores_TE = torch.tensor([[0.0, 3.0, -1.0], [0.5, 0.0, 0.25]])
    chosen_TA, weights_TA = route(scores_TE, torch.tensor([0.5, 2.0, 3.0]), 1)
    assert chosen_TA.tolist() == [[1], [0]]
    assert weights_TA.tolist() == [[2.0], [0.5]]


def test_route_in_bfloat16_normalises_in_float32() -> None:
    scores_TE = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen_TA, weights_TA = route(scores_TE, torch.ones(16, dtype=torch.bfloat16), 8)
    expected = torch.softmax(scores_TE.float(), -1).gather(1, chosen_TA)
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights_TA.float(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 1), (6, 3), (16, 8)])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_experts_token_by_token(num_experts: int, top_k: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    dim, width = 8, 5
    gate_up_EFD, down_EDF = random_experts(num_experts, dim, width)
    x_TD = torch.randn(num_tokens, dim, generator=generator)
    chosen_TA = torch.stack(
        [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)]
    )
    weights_TA = torch.rand(num_tokens, top_k, generator=generator)
    expected = torch.zeros(num_tokens, dim, dtype=torch.float64)
    for t in range(num_tokens):
        for expert, weight in zip(chosen_TA[t].tolist(), weights_TA[t].tolist(), strict=True):
            expected[t] += weight * naive_expert(x_TD[t], gate_up_EFD[expert], down_EDF[expert])
    y_TD = experts(x_TD, chosen_TA, weights_TA, gate_up_EFD, down_EDF)
    torch.testing.assert_close(y_TD.double(), expected, atol=1e-4, rtol=1e-5)


def test_weights_of_experts_nobody_chose_are_not_read() -> None:
    gate_up_EFD, down_EDF = random_experts(4, 8, 5)
    gate_up_EFD[[0, 3]] = torch.nan
    down_EDF[[0, 3]] = torch.nan
    chosen_TA, weights_TA = torch.tensor([[1, 2], [2, 1]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    y_TD = experts(torch.ones(2, 8), chosen_TA, weights_TA, gate_up_EFD, down_EDF)
    one, two = (naive_expert(torch.ones(8), gate_up_EFD[e], down_EDF[e]) for e in (1, 2))
    expected = torch.stack((0.25 * one + 0.75 * two, two))
    torch.testing.assert_close(y_TD.double(), expected, atol=1e-4, rtol=1e-5)


def test_equals_transformers_in_bfloat16() -> None:
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
        y_TD = experts(x_TD, chosen_TA, weights_TA, oracle.gate_up_proj, oracle.down_proj)
        expected = oracle(x_TD, chosen_TA, weights_TA)
    assert y_TD.dtype == torch.bfloat16
    # One unit in bfloat16's last place.
    torch.testing.assert_close(y_TD, expected, atol=1e-3, rtol=2.0**-7)
