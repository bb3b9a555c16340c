"""Launches what works on packed weights: see kernels/linear.py."""

from typing import Any

import torch
from torch import Tensor

from bezel.kernels.cpu.gemm import (
    I4,
    MOST_INT4_ROWS,
    MOST_ROWS,
    bfloat16_kind,
    multiply,
    multiply_row_blocks,
    quantize_all,
    quantize_rows,
)
from bezel.kernels.cpu.lanes import BF16, F32, I8
from bezel.kernels.cpu.launch import Operation, launch
from bezel.kernels.cpu.moe import gather
from bezel.kernels.cpu.packed_rows import unpack_all, unpack_rows
from bezel.kernels.cpu.rows import FEW_VALUES, element_of
from bezel.kernels.packed import COLUMNS, GROUP, PackedWeight, WeightFormat

ELEMENTS = {torch.bfloat16: BF16, torch.float32: F32}


class Scratch:
    """Memory for a large result, kept for the next one: fresh pages cost more than the product.

    What was taken before is overwritten.
    """

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Uninitialised."""
        size = shape[0] * shape[1]
        if self._values.dtype != dtype or self._values.numel() < size:
            self._values = torch.empty(size, dtype=dtype)
        return self._values[:size].view(shape)


_KINDS = {WeightFormat.BFLOAT16: BF16, WeightFormat.INT8: I8, WeightFormat.INT4: I4}

# A product is always shared: it is what takes the time.
_MULTIPLY = {kind: Operation(f"multiply_{kind}", multiply, multiply) for kind in WeightFormat}
_MULTIPLY_EXPERTS = {
    kind: Operation(f"multiply_experts_{kind}", multiply_row_blocks, multiply_row_blocks)
    for kind in WeightFormat
}
_UNPACK = {kind: Operation(f"unpack_{kind}", unpack_rows, unpack_all) for kind in WeightFormat}
_QUANTIZE = Operation("quantize", quantize_rows, quantize_all)
_VALUES_PER_WORD = {WeightFormat.BFLOAT16: 2, WeightFormat.INT8: 4, WeightFormat.INT4: 8}
_ROW_BYTES_AT_ONCE = 1 << 18  # of x, a quarter of a usual second-level cache
_MOST_ROWS = {
    WeightFormat.BFLOAT16: MOST_ROWS,
    WeightFormat.INT8: MOST_ROWS,
    WeightFormat.INT4: MOST_INT4_ROWS,
}


def packed_linear_cpu(
    x_TK: Tensor, weight: PackedWeight, dtype: torch.dtype, out: Scratch | None = None
) -> Tensor:
    num_rows, num_inputs = x_TK.shape
    assert num_inputs == weight.num_inputs
    num_blocks, block_bytes = weight.data.shape
    shape = (num_rows, num_blocks * COLUMNS)
    y_TN = torch.empty(shape, dtype=dtype) if out is None else out.take(shape, dtype)
    rows, factors = _rows_of(x_TK, weight.format)
    row_bytes = rows.stride(0) * rows.element_size()
    numbers = (
        _kind_of(weight.format, x_TK),
        ELEMENTS[dtype],
        rows.data_ptr(),
        row_bytes,
        0 if factors is None else factors.data_ptr(),
        0 if factors is None else factors.stride(0) * 4,
        weight.data.data_ptr(),
        block_bytes,
        num_inputs // _VALUES_PER_WORD[weight.format],
        y_TN.data_ptr(),
        y_TN.stride(0) * y_TN.element_size(),
        num_rows,
        num_blocks,
        rows_at_once(row_bytes),
        _MOST_ROWS[weight.format],
        y_TN.element_size(),
    )
    launch(_MULTIPLY[weight.format], num_rows, False, numbers)
    if weight.num_outputs == y_TN.shape[1]:
        return y_TN
    return y_TN[:, : weight.num_outputs].contiguous()


def _kind_of(format: WeightFormat, x: Tensor) -> Any:
    """What weights of a format are to rows of the dtype of `x`."""
    return bfloat16_kind(element_of(x)) if format is WeightFormat.BFLOAT16 else _KINDS[format]


def _rows_of(x_TK: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor | None]:
    """x as the kernel reads it, and what goes with int8 codes."""
    assert x_TK.stride(1) == 1
    if format is WeightFormat.BFLOAT16:
        return x_TK, None
    num_rows, num_inputs = x_TK.shape
    codes_TK = torch.empty(num_rows, num_inputs, dtype=torch.int8)
    factors = torch.empty(num_rows, 2 * (num_inputs // GROUP))
    numbers = (
        element_of(x_TK),
        x_TK.data_ptr(),
        x_TK.stride(0) * x_TK.element_size(),
        codes_TK.data_ptr(),
        factors.data_ptr(),
        num_inputs,
        format is WeightFormat.INT4,
        x_TK.element_size(),
    )
    launch(_QUANTIZE, num_rows, num_rows * num_inputs <= FEW_VALUES, numbers)
    return codes_TK, factors


def packed_embedding_cpu(
    token_ids_T: Tensor, weight: PackedWeight, scale: float, x_TK: Tensor
) -> None:
    """Write scale · w[token_ids] to `x_TK`."""
    assert token_ids_T.is_contiguous()
    values_TK = torch.empty(x_TK.shape)
    numbers = (
        _KINDS[weight.format],
        ELEMENTS[x_TK.dtype],
        token_ids_T.data_ptr(),
        weight.data.data_ptr(),
        weight.data.shape[1],
        values_TK.data_ptr(),
        x_TK.data_ptr(),
        x_TK.element_size(),
        weight.num_inputs,
        scale,
    )
    num_rows = len(token_ids_T)
    launch(_UNPACK[weight.format], num_rows, x_TK.numel() <= FEW_VALUES, numbers)


def packed_experts_cpu(
    x_TK: Tensor, order_R: Tensor | None, top_k: int, blocks_M3: Tensor, weights: PackedWeight
) -> Tensor:
    """Rows of x times the matrices of their experts, in x's dtype: block m is (matrix, first, end).

    Row r is x[order[r] // top_k], or x[r] without an order. The result's rows may be strided.
    """
    rows_RK, factors = _rows_of(x_TK, weights.format)
    if order_R is not None:
        rows_RK = gather(rows_RK, order_R, top_k)
        factors = None if factors is None else gather(factors, order_R, top_k)
    num_rows = len(rows_RK)
    _, num_blocks, block_bytes = weights.data.shape
    y_RN = x_TK.new_empty(num_rows, num_blocks * COLUMNS)
    numbers = (
        _kind_of(weights.format, x_TK),
        ELEMENTS[x_TK.dtype],
        rows_RK.data_ptr(),
        rows_RK.stride(0) * rows_RK.element_size(),
        0 if factors is None else factors.data_ptr(),
        0 if factors is None else factors.stride(0) * 4,
        weights.data.data_ptr(),
        num_blocks * block_bytes,
        block_bytes,
        weights.num_inputs // _VALUES_PER_WORD[weights.format],
        y_RN.data_ptr(),
        y_RN.stride(0) * y_RN.element_size(),
        blocks_M3.data_ptr(),
        len(blocks_M3),
        num_blocks,
        _MOST_ROWS[weights.format],
        y_RN.element_size(),
    )
    launch(_MULTIPLY_EXPERTS[weights.format], num_rows, False, numbers)
    return y_RN[:, : weights.num_outputs]


def rows_at_once(row_bytes: int) -> int:
    """Rows of x that stay in the second-level cache beside a block of columns."""
    return max(6, _ROW_BYTES_AT_ONCE // row_bytes // 6 * 6)
