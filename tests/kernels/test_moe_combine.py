"""The end of a layer with experts, against its formula token by token in float64."""

import pytest
import torch
from torch import Tensor

from bezel.kernels.moe_combine import combine_experts

EPS = 1e-3


def rms(x_D: Tensor, weight_D: Tensor) -> Tensor:
    return x_D / (float(x_D @ x_D) / len(x_D) + EPS) ** 0.5 * weight_D.double()


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize(("has_scalar", "has_next"), [(True, True), (False, False), (False, True)])
def test_token_by_token(num_dense: int, has_scalar: bool, has_next: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    num_tokens, top_k, dim = 4, 2, 12
    y_TXD = torch.randn(num_tokens, top_k + num_dense, dim, generator=generator)
    weights_TA = torch.rand(num_tokens, top_k, generator=generator)
    routed_norm_D, dense_norm_D, post_norm_D, next_D = torch.rand(4, dim, generator=generator)
    residual_TD, dense_TD = torch.randn(2, num_tokens, dim, generator=generator)
    scalar_1 = torch.tensor([0.7]) if has_scalar else None
    out_TD, next_TD = combine_experts(
        y_TXD,
        weights_TA,
        None if num_dense else dense_TD,
        routed_norm_D,
        dense_norm_D,
        post_norm_D,
        residual_TD,
        EPS,
        scalar_1,
        next_D if has_next else None,
    )
    assert (next_TD is not None) == has_next
    for t in range(num_tokens):
        y_XD, weights = y_TXD[t].double(), weights_TA[t].tolist()
        routed = sum((w * y_D for w, y_D in zip(weights, y_XD, strict=False)), torch.zeros(dim))
        dense = y_XD[top_k:].sum(0) if num_dense else dense_TD[t].double()
        mixed = rms(routed, routed_norm_D) + rms(dense, dense_norm_D)
        out = residual_TD[t].double() + rms(mixed, post_norm_D)
        if has_scalar:
            out = out * 0.7
        torch.testing.assert_close(out_TD[t].double(), out, atol=1e-5, rtol=1e-5)
        if next_TD is not None:
            torch.testing.assert_close(next_TD[t].double(), rms(out, next_D), atol=1e-5, rtol=1e-5)


def test_sum_over_experts_is_not_rounded_between() -> None:
    """In bfloat16 256 + 1 + 1 would be 256."""
    y_TXD = torch.tensor([[[256.0, 258.0], [1.0, 0.0], [1.0, 0.0]]]).bfloat16()
    ones_D = torch.ones(2)
    dense_TD, residual_TD = torch.zeros(2, 1, 2).bfloat16()
    norms = (ones_D, ones_D, ones_D)
    out_TD, _ = combine_experts(
        y_TXD, torch.ones(1, 3), dense_TD, *norms, residual_TD, 0.25, None, None
    )
    assert out_TD.dtype == torch.bfloat16
    assert out_TD[0, 0] == out_TD[0, 1]
