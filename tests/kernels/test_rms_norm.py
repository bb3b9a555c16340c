"""RMSNorm against its formula, value by value."""

import math

import pytest
import torch

from bezel.kernels.rms_norm import rms_norm


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
