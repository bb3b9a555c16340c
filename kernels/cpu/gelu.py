"""`gelu_times` and `gelu_mul` on CPUs."""

import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import LANES, exp2, load, splat, store
from bezel.kernels.cpu.launch import Operation, launch
from bezel.kernels.cpu.rows import element_of, num_bytes, serial, share

# Values that one thread has done before the others have started: each costs a power of two.
_FEW = 1 << 15
_LINEAR = -2.0 * 1.4426950408889634 * 0.7978845608028654
_CUBIC = _LINEAR * 0.044715


@device
def gelu_tanh(x):
    """x / (1 + e^−2u); as the power ends at 2¹²⁷, |x| · 2⁻¹²⁷ is left of what should be zero."""
    return x / (splat(1.0) + exp2(x * (splat(_LINEAR) + splat(_CUBIC) * x * x)))


@serial
def gelu_rows(first, last, gate, stride_g, factor, stride_f, y, width, element):
    size = num_bytes(element)
    for i in range(first, last):
        p_g, p_f, p_y = gate + i * stride_g, factor + i * stride_f, y + i * width * size
        for e in range(0, width, LANES):
            activated = gelu_tanh(load(element, p_g + e * size))
            store(element, p_y + e * size, activated * load(element, p_f + e * size))


@kernel
def _gelu_all(threads, num_rows, *row):
    for i in prange(threads):
        gelu_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *row)


_GELU = Operation("gelu", gelu_rows, _gelu_all)


def _launch(num_rows: int, width: int, *row: object) -> None:
    launch(_GELU, num_rows, num_rows * width <= _FEW, row)


def gelu_mul(gate_up_TF2: Tensor) -> Tensor:
    """As the wrapper's; F is a multiple of 16. Rows are contiguous, at any stride."""
    num_rows, twice = gate_up_TF2.shape
    stride, stride_f = gate_up_TF2.stride()
    assert stride_f == 1
    width, size, p_gate = twice // 2, gate_up_TF2.itemsize, gate_up_TF2.data_ptr()
    y_TF = gate_up_TF2.new_empty(num_rows, width)
    stride *= size
    gate_up = (p_gate, stride, p_gate + width * size, stride)
    _launch(num_rows, width, *gate_up, y_TF.data_ptr(), width, element_of(y_TF))
    return y_TF


def gelu_times(gate_TE: Tensor, factor_TE: Tensor) -> Tensor:
    """As the wrapper's; E is a multiple of 16."""
    num_rows, width = gate_TE.shape
    (stride_g, stride_ge), (stride_f, stride_fe) = gate_TE.stride(), factor_TE.stride()
    assert factor_TE.shape == gate_TE.shape and factor_TE.dtype is gate_TE.dtype
    assert stride_ge == stride_fe == 1
    size = gate_TE.itemsize
    y_TE = torch.empty_like(gate_TE)
    gate, factor = (gate_TE.data_ptr(), stride_g * size), (factor_TE.data_ptr(), stride_f * size)
    _launch(num_rows, width, *gate, *factor, y_TE.data_ptr(), width, element_of(y_TE))
    return y_TE
