"""`softcap` on CPUs."""

import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.jit import kernel
from bezel.kernels.cpu.lanes import F32, LANES, exp2, load, splat, store
from bezel.kernels.cpu.rows import element_of, num_bytes, serial, share

# One row is enough for all threads, so that what they share are parts of rows.
_PART = 1 << 12


@serial
def _softcap_parts(first, last, x, stride_x, y, width, cap, element):
    num_parts = (width + _PART - 1) // _PART
    size = num_bytes(element)
    for i in range(first, last):
        p_x, p_y = x + i // num_parts * stride_x, y + i // num_parts * width * 4
        start = i % num_parts * _PART
        for v in range(start, min(start + _PART, width), LANES):
            # tanh(u) = 1 − 2 / (1 + e^2u)
            power = exp2(load(element, p_x + v * size) * splat(2.0 * 1.4426950408889634 / cap))
            store(F32, p_y + v * 4, splat(cap) - splat(2.0 * cap) / (splat(1.0) + power))


@kernel
def _softcap_all(threads, num_parts, *row):
    for i in prange(threads):
        _softcap_parts(share(i, threads, num_parts), share(i + 1, threads, num_parts), *row)


def softcap(logits_NV: Tensor, cap: float) -> Tensor:
    """As the wrapper's; V is a multiple of 16. A logit that is NaN becomes −cap."""
    num_rows, width = logits_NV.shape
    stride, stride_v = logits_NV.stride()
    assert stride_v == 1
    y_NV = torch.empty(num_rows, width, dtype=torch.float32)
    stride *= logits_NV.itemsize
    p_x, p_y, element = logits_NV.data_ptr(), y_NV.data_ptr(), element_of(logits_NV)
    num_parts = num_rows * (-(-width // _PART))
    row = (p_x, stride, p_y, width, float(cap), element)
    if num_parts <= 2:
        _softcap_parts(0, num_parts, *row)
    else:
        _softcap_all(torch.get_num_threads(), num_parts, *row)
    return y_NV
