"""Gated GELU on CPUs equals its reference in float32, rounded once."""

import pytest
import torch
from torch import Tensor

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.gelu_mul import gelu_mul, gelu_times

HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


pytestmark = pytest.mark.usefixtures("three_threads")


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    rtol = HALF_UNIT[actual.dtype] + 1e-5
    torch.testing.assert_close(actual.float(), expected, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("dtype", HALF_UNIT)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 16), (1, 2048), (5, 48), (70, 640)])
def test_gelu_mul(num_rows: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    gate_up_TF2 = (torch.randn(num_rows, 2 * width, generator=generator) * 3).to(dtype)
    y_TF = gelu_mul(gate_up_TF2)
    with plain_torch():
        expected_TF = gelu_mul(gate_up_TF2.float())
    assert y_TF.dtype == dtype and y_TF.is_contiguous()
    assert_rounded_once(y_TF, expected_TF)


@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_rows_at_any_stride(dtype: torch.dtype) -> None:
    """NaN between the rows of the gate, and a factor as each layer's part of many is."""
    gate_TE = torch.full((6, 80), torch.nan, dtype=dtype)[:, :64]
    mixed_TLE = torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    gate_TE.copy_(torch.randn(6, 64, generator=torch.Generator().manual_seed(2)))
    y_TE = gelu_times(gate_TE, mixed_TLE[:, 1])
    with plain_torch():
        expected_TE = gelu_times(gate_TE.float(), mixed_TLE[:, 1].float())
    assert_rounded_once(y_TE, expected_TE)


def test_extreme_gates() -> None:
    """Those that are infinite or NaN stay so; what is far below zero comes to almost nothing."""
    gates = [1e30, 200.0, 0.0, -200.0, torch.inf, torch.nan, 5.0, -5.0] * 2
    y = gelu_times(torch.tensor([gates]), torch.ones(1, 16))[0, :8].tolist()
    assert y[:3] == [torch.tensor(1e30).item(), 200.0, 0.0] and -1e-35 < y[3] <= 0
    assert y[4] == torch.inf and y[5] != y[5]
    assert y[6] == pytest.approx(5 - 2.29e-7, rel=1e-6) and y[7] == pytest.approx(
        -2.29e-7, rel=1e-2
    )


def test_a_row_does_not_depend_on_the_others() -> None:
    gate_up_TF2 = torch.randn(70, 2 * 640, generator=torch.Generator().manual_seed(0)).bfloat16()
    y_TF = gelu_mul(gate_up_TF2)
    for i in (0, 23, 69):
        assert torch.equal(gelu_mul(gate_up_TF2[i : i + 1]), y_TF[i : i + 1])
