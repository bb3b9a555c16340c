"""Norms on CPUs equal their references in float32, rounded once, on any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-6
HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
dtypes = st.sampled_from(list(HALF_UNIT))
widths = st.sampled_from([16, 48, 64, 112, 640])
# The last is enough for several threads, and no multiple of their number.
num_rows = st.sampled_from([0, 1, 2, 7, 1100])


pytestmark = pytest.mark.usefixtures("three_threads")


def rows(num_rows: int, width: int, dtype: torch.dtype, gap: int, seed: int) -> Tensor:
    """Random rows of quite different sizes, with NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.full((num_rows, width + gap), torch.nan, dtype=dtype)[:, :width]
    sizes_T1 = torch.logspace(-3, 1, num_rows)[:, None]
    return x_TD.copy_(torch.randn(num_rows, width, generator=generator) * sizes_T1)


def weights(num_rows: int, width: int, seed: int) -> Tensor:
    return torch.rand(num_rows, width, generator=torch.Generator().manual_seed(seed)) * 2 - 0.5


def assert_rounded_once(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and expected.dtype == torch.float32 and actual.is_contiguous()
    torch.testing.assert_close(actual.float(), expected, rtol=HALF_UNIT[dtype] + 1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(num_rows, widths, dtypes, st.sampled_from([0, 3]), st.booleans())
def test_rms_norm(
    num_rows: int, width: int, dtype: torch.dtype, gap: int, has_weight: bool
) -> None:
    x_TD = rows(num_rows, width, dtype, gap, seed=0)
    weight_D = weights(1, width, seed=1)[0] if has_weight else None
    with plain_torch():
        expected_TD = rms_norm(x_TD.float(), weight_D, EPS)
    assert_rounded_once(rms_norm(x_TD, weight_D, EPS), expected_TD, dtype)


@settings(max_examples=30, deadline=None)
@given(
    num_rows,
    widths,
    dtypes,
    st.sampled_from([(0, 0), (16, 0), (0, 5)]),
    st.booleans(),
    st.sampled_from([None, torch.float32, "of x"]),
    st.integers(0, 3),
)
def test_add_rms_norm(
    num_rows: int,
    width: int,
    dtype: torch.dtype,
    gaps: tuple[int, int],
    has_weight: bool,
    scalar_dtype: torch.dtype | str | None,
    num_next: int,
) -> None:
    """The next norms are those of the sum as it was rounded."""
    scalar_1 = None
    if scalar_dtype is not None:
        scalar_1 = torch.tensor([0.7], dtype=dtype if scalar_dtype == "of x" else scalar_dtype)
    x_TD = rows(num_rows, width, dtype, gaps[0], seed=0)
    residual_TD = rows(num_rows, width, dtype, gaps[1], seed=2)
    weight_D = weights(1, width, seed=1)[0] if has_weight else None
    next_weight_ND = weights(num_next, width, seed=3) if num_next else None
    y_TD, z_NTD = add_rms_norm(x_TD, weight_D, residual_TD, EPS, scalar_1, next_weight_ND)
    scalar = None if scalar_1 is None else scalar_1.float()
    with plain_torch():
        expected_TD, _ = add_rms_norm(
            x_TD.float(), weight_D, residual_TD.float(), EPS, scalar, None
        )
        assert_rounded_once(y_TD, expected_TD, dtype)
        if next_weight_ND is None:
            assert z_NTD is None
            return
        assert z_NTD is not None and z_NTD.shape == (num_next, *x_TD.shape)
        for z_TD, next_weight_D in zip(z_NTD, next_weight_ND, strict=True):
            assert_rounded_once(z_TD, rms_norm(y_TD.float(), next_weight_D, EPS), dtype)


@pytest.mark.parametrize("permuted", [False, True])
def test_any_leading_dimensions(permuted: bool) -> None:
    x = rows(6, 64, torch.bfloat16, 0, seed=0).view(2, 3, 64)
    x = x.transpose(0, 1) if permuted else x
    weight_D = weights(1, 64, 1)[0]
    with plain_torch():
        expected = rms_norm(x.float(), weight_D, EPS)
    assert_rounded_once(rms_norm(x, weight_D, EPS), expected, torch.bfloat16)


def test_a_row_does_not_depend_on_the_others() -> None:
    """Nor on the thread that computes it."""
    x_TD, residual_TD = (rows(160, 640, torch.bfloat16, 0, seed) for seed in (0, 1))
    weight_D, next_weight_ND = weights(1, 640, 2)[0], weights(2, 640, 3)
    of_all = add_rms_norm(x_TD, weight_D, residual_TD, EPS, None, next_weight_ND)
    for i in (0, 53, 54, 159):
        some = slice(i, i + 1)
        y_1D, z_N1D = add_rms_norm(
            x_TD[some], weight_D, residual_TD[some], EPS, None, next_weight_ND
        )
        assert of_all[1] is not None and z_N1D is not None
        assert torch.equal(of_all[0][some], y_1D) and torch.equal(of_all[1][:, some], z_N1D)


def test_zeros_and_huge_values_stay_finite() -> None:
    """The square of the largest bfloat16 is infinite in float32, its norm then zero."""
    most = torch.finfo(torch.bfloat16).max
    x_TD = torch.tensor([[0.0] * 16, [1e18] * 16, [most] * 16]).bfloat16()
    assert rms_norm(x_TD, None, EPS).float().unique(dim=1).flatten().tolist() == [0.0, 1.0, 0.0]
