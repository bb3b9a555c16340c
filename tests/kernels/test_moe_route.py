"""Routing against a loop over experts."""

import math

import pytest
import torch

from bezel.kernels.moe_route import route


def naive_route(
    scores: list[float], scales: list[float], top_k: int
) -> tuple[list[int], list[float]]:
    total = sum(math.exp(score) for score in scores)
    ranked = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]
    probabilities = [math.exp(scores[e]) / total for e in ranked]
    weights = [
        p / sum(probabilities) * scales[e] for p, e in zip(probabilities, ranked, strict=True)
    ]
    return ranked, weights


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 1), (16, 2), (128, 8), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route(num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(top_k)
    scores_TE = (torch.randn(10, num_experts, generator=generator) * 2).to(dtype)
    scale_E = (torch.rand(num_experts, generator=generator) + 0.5).to(dtype)
    chosen_TA, weights_TA = route(scores_TE, scale_E, top_k)
    assert (chosen_TA.dtype, weights_TA.dtype) == (torch.int32, torch.float32)
    for t, scores in enumerate(scores_TE.tolist()):
        chosen, weights = naive_route(scores, scale_E.tolist(), top_k)
        assert chosen_TA[t].tolist() == chosen
        torch.testing.assert_close(weights_TA[t], torch.tensor(weights))


def test_top_1_weighs_its_expert_by_the_scale_alone() -> None:
    scores_TE = torch.tensor([[0.0, 3.0, -1.0], [0.5, 0.0, 0.25]])
    chosen_TA, weights_TA = route(scores_TE, torch.tensor([0.5, 2.0, 3.0]), 1)
    assert chosen_TA.tolist() == [[1], [0]]
    assert weights_TA.tolist() == [[2.0], [0.5]]


def test_lower_id_first_among_equals() -> None:
    scores_TE = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0] * 5])
    chosen_TA, weights_TA = route(scores_TE, torch.ones(5), 4)
    assert chosen_TA.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert weights_TA[1].tolist() == [0.25] * 4


def test_huge_scores_do_not_overflow() -> None:
    _, weights_TA = route(torch.tensor([[3e38, 3e38, -3e38]]), torch.ones(3), 2)
    assert weights_TA.tolist() == [[0.5, 0.5]]
