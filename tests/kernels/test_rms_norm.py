"""RMSNorm, alone and with the residual sum around it, against its formula value by value."""

import math

import pytest
import torch

from bezel.kernels.rms_norm import add_rms_norm, rms_norm


def naive(row: list[float], weight: list[float], eps: float) -> list[float]:
    mean_square = sum(x * x for x in row) / len(row)
    return [x / math.sqrt(mean_square + eps) * w for x, w in zip(row, weight, strict=True)]


@pytest.mark.parametrize("width", [1, 3, 60, 512])
@pytest.mark.parametrize("has_weight", [True, False])
def test_every_row_by_its_formula(width: int, has_weight: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 5, width, generator=generator) * 3
    weight = torch.randn(width, generator=generator) if has_weight else None
    expected = [
        [naive(row, weight.tolist() if weight is not None else [1.0] * width, 1e-6) for row in rows]
        for rows in x.tolist()
    ]
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.tensor(expected))


def test_eps_keeps_zeros_at_zero_and_tempers_tiny_rows() -> None:
    assert rms_norm(torch.zeros(1, 4), None, 1e-6).tolist() == [[0.0] * 4]
    y = rms_norm(torch.full((1, 4), 1e-3), None, 1e-6)
    torch.testing.assert_close(y, torch.full((1, 4), 0.5**0.5))


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    """The norm, the weight and their product are float32; a bfloat16 in between would differ."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 256, generator=generator).bfloat16()
    weight = torch.rand(256, generator=generator) + 0.5
    expected = torch.tensor(
        [naive(row, weight.tolist(), 1e-6) for row in x.tolist()], dtype=torch.float64
    )
    y = rms_norm(x, weight, 1e-6)
    assert y.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and a hair for float32's own rounding.
    allowed = expected.abs() * (2.0**-8 + 1e-6)
    assert ((y.double() - expected).abs() <= allowed).all()
    rounded_twice = rms_norm(x, None, 1e-6) * weight.bfloat16()
    assert ((rounded_twice.double() - expected).abs() > allowed).any()


def test_large_bfloat16_values_do_not_overflow() -> None:
    y = rms_norm(torch.full((1, 8), 1e18, dtype=torch.bfloat16), None, 1e-6)
    assert y.tolist() == [[1.0] * 8]


@pytest.mark.parametrize("num_next", [0, 1, 3])
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("scalar", [None, 0.7])
def test_the_sum_and_its_norms_by_their_formulas(
    num_next: int, has_weight: bool, scalar: float | None
) -> None:
    generator = torch.Generator().manual_seed(num_next)
    x_TD, residual_TD = torch.randn(2, 5, 60, generator=generator) * 3
    weight_D = torch.randn(60, generator=generator) if has_weight else None
    next_weight_ND = torch.randn(num_next, 60, generator=generator) if num_next else None
    y_TD, z_NTD = add_rms_norm(
        x_TD,
        weight_D,
        residual_TD,
        1e-6,
        None if scalar is None else torch.tensor([scalar]),
        next_weight_ND,
    )
    weight = [1.0] * 60 if weight_D is None else weight_D.tolist()
    sums = [
        [(r + n) * (scalar or 1.0) for r, n in zip(residual, naive(x, weight, 1e-6), strict=True)]
        for x, residual in zip(x_TD.tolist(), residual_TD.tolist(), strict=True)
    ]
    torch.testing.assert_close(y_TD, torch.tensor(sums))
    if next_weight_ND is None:
        assert z_NTD is None
        return
    norms = [[naive(row, w, 1e-6) for row in sums] for w in next_weight_ND.tolist()]
    torch.testing.assert_close(z_NTD, torch.tensor(norms))


def test_bfloat16_sums_are_those_of_separate_steps() -> None:
    """Norm, sum, product and the next norm round one after the other, as modules would."""
    generator = torch.Generator().manual_seed(0)
    x_TD, residual_TD = (torch.randn(2, 9, 100, generator=generator) * 3).bfloat16()
    weight_ND = torch.rand(3, 100, generator=generator) + 0.5
    scalar_1 = torch.tensor([0.7]).bfloat16()
    y_TD, z_NTD = add_rms_norm(x_TD, weight_ND[2], residual_TD, 1e-6, scalar_1, weight_ND[:2])
    expected_TD = (residual_TD + rms_norm(x_TD, weight_ND[2], 1e-6)) * scalar_1
    assert torch.equal(y_TD, expected_TD)
    assert z_NTD is not None
    assert torch.equal(z_NTD[0], rms_norm(expected_TD, weight_ND[0], 1e-6))
    assert torch.equal(z_NTD[1], rms_norm(expected_TD, weight_ND[1], 1e-6))


def test_a_float32_scalar_is_not_rounded_to_bfloat16() -> None:
    x_TD = torch.zeros(1, 128, dtype=torch.bfloat16)
    residual_TD = torch.arange(128, 256)[None].bfloat16()
    y_TD, _ = add_rms_norm(x_TD, None, residual_TD, 1e-6, torch.tensor([2.0**-0.5]), None)
    assert torch.equal(y_TD, residual_TD * 2.0**-0.5)
    rounded = torch.tensor([2.0**-0.5]).bfloat16()
    assert not torch.equal(y_TD, residual_TD * rounded)
