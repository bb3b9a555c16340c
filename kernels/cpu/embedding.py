"""Rows of a table of plain floats times a constant, on CPUs."""

import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.jit import kernel
from bezel.kernels.cpu.lanes import LANES, load, load_i64, splat, store
from bezel.kernels.cpu.norms import norm_row
from bezel.kernels.cpu.rows import FEW_VALUES, element_of, num_bytes, serial, share


@serial
def _embed_rows(
    first, last, token_ids, table, stride, scale, norm_weight, x, z, width, eps, element
):
    size = num_bytes(element)
    for t in range(first, last):
        p_row, p_x = table + load_i64(token_ids + t * 8) * stride, x + t * width * size
        for d in range(0, width * size, LANES * size):
            store(element, p_x + d, load(element, p_row + d) * splat(scale))
        if norm_weight != 0:
            norm_row(element, p_x, norm_weight, z + t * width * size, width, eps)


@kernel
def _embed_all(threads, num_rows, *row):
    for i in prange(threads):
        _embed_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *row)


def _embed(
    token_ids_T: Tensor, weight_VD: Tensor, scale: float, norm_weight_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    num_tokens, width = token_ids_T.shape[0], weight_VD.shape[1]
    stride, stride_d = weight_VD.stride()
    assert token_ids_T.dtype is torch.int64 and token_ids_T.is_contiguous() and stride_d == 1
    assert norm_weight_D is None or norm_weight_D.dtype is torch.float32
    x_TD, z_TD = torch.empty(num_tokens, width, dtype=weight_VD.dtype), None
    p_norm, p_z = 0, 0
    if norm_weight_D is not None:
        z_TD = torch.empty_like(x_TD)
        p_norm, p_z = norm_weight_D.data_ptr(), z_TD.data_ptr()
    row = (
        token_ids_T.data_ptr(),
        weight_VD.data_ptr(),
        stride * weight_VD.itemsize,
        float(scale),
        p_norm,
        x_TD.data_ptr(),
        p_z,
        width,
        eps,
        element_of(weight_VD),
    )
    if num_tokens * width <= FEW_VALUES:
        _embed_rows(0, num_tokens, *row)
    else:
        _embed_all(torch.get_num_threads(), num_tokens, *row)
    return x_TD, z_TD


def scaled_embedding(token_ids_T: Tensor, weight_VD: Tensor, scale: float) -> Tensor:
    """As the wrapper's; D is a multiple of 16."""
    return _embed(token_ids_T, weight_VD, scale, None, 0.0)[0]


def embed_and_norm(
    token_ids_T: Tensor, weight_VD: Tensor, scale: float, norm_weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the wrapper's; D is a multiple of 16."""
    x_TD, z_TD = _embed(token_ids_T, weight_VD, scale, norm_weight_D, eps)
    assert z_TD is not None
    return x_TD, z_TD
