"""Routing and joining of experts on CPUs equal their references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.moe_combine import combine_experts
from bezel.kernels.moe_route import route
from bezel.kernels.rms_norm import rms_norm

EPS = 1e-3
# Half a unit in the last place, and what float32 loses in sums of any order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8 + 1e-5}
dtypes = st.sampled_from(list(TOLERANCE))


pytestmark = pytest.mark.usefixtures("three_threads")


def arguments(
    num_tokens: int,
    dim: int,
    top_k: int,
    num_dense: int,
    has_scalar: bool,
    has_next: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | float | None, ...]:
    """Rows of a given dense MLP and of the residual have NaN between them."""
    generator = torch.Generator().manual_seed(num_tokens)
    y_TXD = torch.randn(num_tokens, top_k + num_dense, dim, generator=generator).to(dtype)
    rows_2TD = torch.full((2, num_tokens, dim + 8), torch.nan, dtype=dtype)[:, :, :dim]
    rows_2TD.copy_(torch.randn(2, num_tokens, dim, generator=generator))
    norms_4D = torch.rand(4, dim, generator=generator) + 0.5
    return (
        y_TXD,
        torch.rand(num_tokens, top_k, generator=generator),
        None if num_dense else rows_2TD[0],
        *norms_4D[:3],
        rows_2TD[1],
        EPS,
        torch.tensor([0.7], dtype=dtype) if has_scalar else None,
        norms_4D[3] if has_next else None,
    )


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([0, 1, 5, 200]),
    st.sampled_from([16, 112, 640]),
    st.integers(1, 8),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
    st.booleans(),
    dtypes,
)
def test_combine(
    num_tokens: int,
    dim: int,
    top_k: int,
    num_dense: int,
    has_scalar: bool,
    has_next: bool,
    dtype: torch.dtype,
) -> None:
    """The next norm is that of the sum as it was rounded."""
    given = arguments(num_tokens, dim, top_k, num_dense, has_scalar, has_next, dtype)
    out_TD, next_TD = combine_experts(*given)  # type: ignore[arg-type]
    floats = [x.float() if isinstance(x, Tensor) else x for x in given]
    with plain_torch():
        expected_TD, _ = combine_experts(*floats)  # type: ignore[arg-type]
    assert out_TD.dtype == dtype and (next_TD is not None) == has_next
    rtol = TOLERANCE[dtype]
    torch.testing.assert_close(out_TD.float(), expected_TD, rtol=rtol, atol=1e-5)
    if next_TD is not None:
        assert next_TD.dtype == dtype
        with plain_torch():
            expected_TD = rms_norm(out_TD.float(), given[-1], EPS)  # type: ignore[arg-type]
        torch.testing.assert_close(next_TD.float(), expected_TD, rtol=rtol, atol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    given = arguments(200, 640, 4, 2, True, True, torch.bfloat16)
    together = combine_experts(*given)  # type: ignore[arg-type]
    for i in (0, 66, 199):
        some = slice(i, i + 1)
        y_TXD, weights_TA, dense, *norms, residual_TD, eps, scalar_1, next_D = given
        rows = (y_TXD[some], weights_TA[some], dense, *norms, residual_TD[some])  # type: ignore
        alone = combine_experts(*rows, eps, scalar_1, next_D)  # type: ignore[arg-type]
        for of_all, of_one in zip(together, alone, strict=True):
            assert of_all is not None and of_one is not None
            assert torch.equal(of_all[some], of_one)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([0, 1, 4, 150]),
    st.sampled_from([1, 3, 8, 128]),
    st.integers(1, 8),
    dtypes,
    dtypes,
    st.booleans(),
)
def test_route(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    ties: bool,
) -> None:
    """Of equal scores the lower id comes first, as in a stable sort."""
    generator = torch.Generator().manual_seed(num_experts)
    scores_TE = torch.randn(num_tokens, num_experts + 3, generator=generator)[:, :num_experts]
    scores_TE = (scores_TE.round() if ties else scores_TE * 3).to(dtype)
    scale_E = (torch.rand(num_experts, generator=generator) + 0.5).to(scale_dtype)
    top_k = min(top_k, num_experts)
    chosen_TA, weights_TA = route(scores_TE, scale_E, top_k)
    with plain_torch():
        expected_chosen_TA, expected_TA = route(scores_TE, scale_E, top_k)
    assert chosen_TA.dtype == torch.int32 and weights_TA.dtype == torch.float32
    assert torch.equal(chosen_TA, expected_chosen_TA)
    torch.testing.assert_close(weights_TA, expected_TA, rtol=1e-5, atol=1e-7)


def test_nan_scores_are_taken_for_minus_infinity() -> None:
    scores_TE = torch.tensor([[torch.nan, -1.0, torch.nan, 2.0]])
    chosen_TA, weights_TA = route(scores_TE, torch.ones(4), 3)
    assert chosen_TA.tolist() == [[3, 1, 0]]
    expected_TA = torch.tensor([[2.0, -1.0, -torch.inf]]).softmax(1)
    torch.testing.assert_close(weights_TA, expected_TA)
