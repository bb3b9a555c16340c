"""`kernels/rms_norm.py` on CPUs: a row is read twice, the second time from the nearest cache."""

import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import F32, LANES, load, splat, store
from bezel.kernels.cpu.launch import Operation, launch
from bezel.kernels.cpu.rows import FEW_VALUES, element_of, inverse_rms, num_bytes, serial, share


@device
def norm_row(element, x, weight, y, width, eps):
    """y = rms(x) · weight; without a weight its address is 0."""
    size = num_bytes(element)
    scale = splat(inverse_rms(element, x, width, eps))
    if weight == 0:
        for d in range(0, width, LANES):
            store(element, y + d * size, load(element, x + d * size) * scale)
    else:
        for d in range(0, width, LANES):
            normed = load(element, x + d * size) * scale * load(F32, weight + d * 4)
            store(element, y + d * size, normed)


@serial
def norm_rows(first, last, x, stride_x, weight, y, width, eps, element):
    for i in range(first, last):
        norm_row(element, x + i * stride_x, weight, y + i * width * num_bytes(element), width, eps)


@kernel
def _norm_all(threads, num_rows, *row):
    for i in prange(threads):
        norm_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *row)


@serial
def add_norm_rows(
    first,
    last,
    num_rows,
    x,
    stride_x,
    weight,
    residual,
    stride_r,
    scalar,
    next_weights,
    stride_n,
    num_next,
    y,
    z,
    width,
    eps,
    element,
):
    size = num_bytes(element)
    factor = splat(scalar)
    for i in range(first, last):
        p_x, p_r, p_y = x + i * stride_x, residual + i * stride_r, y + i * width * size
        scale = splat(inverse_rms(element, p_x, width, eps))
        for d in range(0, width, LANES):
            normed = load(element, p_x + d * size) * scale
            if weight != 0:
                normed = normed * load(F32, weight + d * 4)
            store(element, p_y + d * size, (load(element, p_r + d * size) + normed) * factor)
        if num_next > 0:
            # Of y as it was stored, so that a norm of the stored y would come to the same.
            scale = splat(inverse_rms(element, p_y, width, eps))
        for n in range(num_next):
            p_z, p_w = z + (n * num_rows + i) * width * size, next_weights + n * stride_n
            for d in range(0, width, LANES):
                normed = load(element, p_y + d * size) * scale * load(F32, p_w + d * 4)
                store(element, p_z + d * size, normed)


@kernel
def _add_norm_all(threads, num_rows, *row):
    for i in prange(threads):
        add_norm_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *row)


_NORM = Operation("norm", norm_rows, _norm_all)
_ADD_NORM = Operation("add_norm", add_norm_rows, _add_norm_all)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As the wrapper's; the last dimension is a multiple of 16."""
    shape = x.shape
    width = shape[-1]
    x_TD = x if len(shape) == 2 else x.reshape(-1, width)
    num_rows, (stride, stride_d) = x_TD.shape[0], x_TD.stride()
    assert stride_d == 1 and (weight is None or weight.dtype is torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    p_weight = 0 if weight is None else weight.data_ptr()
    stride *= x.itemsize
    row = (x_TD.data_ptr(), stride, p_weight, y.data_ptr(), width, eps, element_of(x))
    launch(_NORM, num_rows, num_rows * width <= FEW_VALUES, row)
    return y


def add_rms_norm(
    x_TD: Tensor,
    weight_D: Tensor | None,
    residual_TD: Tensor,
    eps: float,
    scalar_1: Tensor | None,
    next_weight_ND: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """As the wrapper's; D is a multiple of 16."""
    num_rows, width = x_TD.shape
    (stride_x, stride_xd), (stride_r, stride_rd) = x_TD.stride(), residual_TD.stride()
    assert residual_TD.shape == x_TD.shape and residual_TD.dtype is x_TD.dtype
    assert stride_xd == stride_rd == 1
    assert weight_D is None or weight_D.dtype is torch.float32
    size = x_TD.itemsize
    y_TD = torch.empty_like(x_TD)
    num_next, p_next, stride_n, p_z, z_NTD = 0, 0, 0, 0, None
    if next_weight_ND is not None:
        num_next = next_weight_ND.shape[0]
        stride_n, stride_nd = next_weight_ND.stride()
        assert stride_nd == 1 and next_weight_ND.dtype is torch.float32
        z_NTD = x_TD.new_empty(num_next, num_rows, width)
        p_next, p_z = next_weight_ND.data_ptr(), z_NTD.data_ptr()
    row = (
        num_rows,
        x_TD.data_ptr(),
        stride_x * size,
        0 if weight_D is None else weight_D.data_ptr(),
        residual_TD.data_ptr(),
        stride_r * size,
        1.0 if scalar_1 is None else scalar_1.item(),
        p_next,
        stride_n * 4,
        num_next,
        y_TD.data_ptr(),
        p_z,
        width,
        eps,
        element_of(x_TD),
    )
    launch(_ADD_NORM, num_rows, num_rows * width <= FEW_VALUES, row)
    return y_TD, z_NTD
