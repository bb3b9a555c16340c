"""Gated GELU against its formula."""

import math

import torch

from bezel.kernels.gelu_mul import gelu_mul, gelu_times


def naive_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_first_half_is_the_gate() -> None:
    gate_up = torch.randn(7, 2 * 33, generator=torch.Generator().manual_seed(0)) * 3
    expected = [
        [naive_gelu(row[i]) * row[33 + i] for i in range(33)] for row in gate_up.double().tolist()
    ]
    torch.testing.assert_close(gelu_mul(gate_up), torch.tensor(expected))


def test_tanh_approximation_not_erf() -> None:
    """The two differ by 4e-4 near x = 2.3; Gemma was trained with tanh."""
    y = gelu_mul(torch.tensor([[2.3, 1.0]], dtype=torch.float64)).item()
    erf = 2.3 * 0.5 * (1 + math.erf(2.3 / math.sqrt(2)))
    assert abs(y - naive_gelu(2.3)) < 1e-9
    assert abs(y - erf) > 1e-4


def test_keeps_bfloat16() -> None:
    y = gelu_mul(torch.tensor([[1.0, 2.0, 3.0, -4.0]], dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    # gelu(1) = 0.8412 and gelu(2) = 1.9546 are rounded to 8 bits, 215/256 and 125/64, and then so
    # are their products with 3 and −4.
    assert y.tolist() == [[161 / 64, -125 / 16]]


def test_the_factor_may_be_a_view_with_a_stride() -> None:
    """As each layer's part of the per-layer embeddings is."""
    gate_TE, mixed_TLE = torch.randn(4, 6), torch.randn(4, 3, 6)
    y_TE = gelu_times(gate_TE, mixed_TLE.unbind(1)[1])
    expected = [
        [naive_gelu(gate) * factor for gate, factor in zip(gates, factors[1], strict=True)]
        for gates, factors in zip(
            gate_TE.double().tolist(), mixed_TLE.double().tolist(), strict=True
        )
    ]
    torch.testing.assert_close(y_TE, torch.tensor(expected))
