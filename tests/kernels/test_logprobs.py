"""Log-probabilities against the formula in float64, and the rank order of the likeliest."""

import math

import pytest
import torch

from bezel.kernels.logprobs import logprobs


@pytest.mark.parametrize("num_top", [0, 1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(num_top: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = (torch.randn(4, 40, generator=generator) * 5).to(dtype)
    token_ids_N = torch.tensor([0, 39, 7, 20])
    chosen_N, top_NM, ids_NM = logprobs(logits_NV, token_ids_N, num_top)
    for n in range(4):
        row = logits_NV[n].tolist()
        total = math.log(sum(math.exp(x) for x in row))
        order = sorted(range(40), key=lambda i: (-row[i], i))[:num_top]
        assert ids_NM[n].tolist() == order
        assert top_NM[n].tolist() == pytest.approx([row[i] - total for i in order], abs=1e-5)
        assert chosen_N[n].item() == pytest.approx(row[token_ids_N[n]] - total, abs=1e-5)


def test_equal_logits_rank_by_token_id_and_banned_ones_last() -> None:
    logits_NV = torch.tensor([[0.0, -math.inf, 0.0, 1.0, -math.inf, 0.0]])
    _, top_NM, ids_NM = logprobs(logits_NV, torch.tensor([3]), 6)
    assert ids_NM.tolist() == [[3, 0, 2, 5, 1, 4]]
    assert top_NM[0, 4:].tolist() == [-math.inf, -math.inf]
