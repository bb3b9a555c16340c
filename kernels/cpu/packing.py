"""Rows of a matrix into their places in a packed weight, as `kernels.packed` lays it out.

A row stands in one column of a block of 64, whatever the other rows are: so a matrix is packed a
few rows at a time, with nothing of it but those in memory. Rows are rounded one by one into memory
of the thread, then word by word into the block: there the words of neighbouring rows are next to
each other. The results are bit for bit those of `kernels.packed.pack_weight`.
"""

from typing import Any

import numpy as np
import torch
from numba import prange, types
from numba.extending import overload
from torch import Tensor

from bezel.kernels.cpu.gemm import GROUP_BYTES
from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import (
    BF16,
    I8,
    LANES,
    lane_max,
    load,
    load_i32,
    magnitude,
    maximum,
    splat,
    store,
    store_f32,
    store_i32,
)
from bezel.kernels.cpu.rows import element_of
from bezel.kernels.cpu.tiles import TILE_BYTES
from bezel.kernels.packed import COLUMNS, GROUP, Int4Values, PackedWeight, WeightFormat

_MANY_VALUES = 1 << 16  # below, starting threads takes longer than the work
LINE_WORDS = 16
_SIGNS = -0x7F7F7F80  # of four int8 codes, to add 128 to each


def pack_rows(values_NK: Tensor | Int4Values, weight: PackedWeight, first: int) -> None:
    """Write rows [first, first + N) of a packed matrix: float32 or bfloat16 to BFLOAT16 and INT8,
    int4 values to INT4."""
    num_rows, num_values = values_NK.shape
    assert num_values == weight.num_inputs and first + num_rows <= len(weight.data) * COLUMNS
    place = weight.data.data_ptr(), weight.data.stride(0), first
    threads = torch.get_num_threads() if num_rows * num_values >= _MANY_VALUES else 1
    if isinstance(values_NK, Int4Values):
        assert weight.format is WeightFormat.INT4
        codes = values_NK.codes.contiguous()
        halves = (_halves(part) for part in (values_NK.scale, values_NK.minimum))
        target = weight.data.numpy().view(np.int16)
        _pack_codes(codes.data_ptr(), *halves, num_rows, num_values, *place, target, threads)
        return
    assert weight.format is not WeightFormat.INT4
    kind = I8 if weight.format is WeightFormat.INT8 else BF16
    rows = values_NK.contiguous()
    source = element_of(rows), rows.data_ptr(), rows.element_size()
    rounded = np.empty((threads, COLUMNS, weight.data.stride(0) // COLUMNS), np.uint8)
    _pack_values(kind, *source, num_rows, num_values, *place, rounded, threads)


def _halves(values_NG: Tensor) -> np.ndarray[Any, Any]:
    """Bits of float16."""
    bits: np.ndarray[Any, Any] = values_NG.half().contiguous().view(torch.int16).numpy()
    return bits


@device
def _part_of_block(block, first, num_rows):
    """Which of the rows are a block's, and the column of the first one there."""
    start = max(0, block * COLUMNS - first)
    end = min(num_rows, (block + 1) * COLUMNS - first)
    return start, end, (first + start) % COLUMNS


@device
def _interleave(rows, num_words, count, target, column, flipped):
    """Words of `count` rows, which lie one after the other, into neighbouring columns."""
    for first in range(0, num_words, LINE_WORDS):  # a line of the cache of each row
        for i in range(count):
            for word in range(first, min(first + LINE_WORDS, num_words)):
                bits = load_i32(rows + 4 * (i * num_words + word)) ^ flipped
                store_i32(target + word * TILE_BYTES + 4 * (column + i), bits)


def _round_row(kind, element, size, x, num_values, row, block, column):
    """A row as it is packed, not yet interleaved."""


@overload(_round_row)
def _round_row_of_kind(kind, element, size, x, num_values, row, block, column):
    return _round_to_int8 if kind == types.int8 else _round_to_bfloat


def _round_to_bfloat(kind, element, size, x, num_values, row, block, column):
    for k in range(0, num_values, LANES):
        store(BF16, row + 2 * k, load(element, x + k * size))


def _round_to_int8(kind, element, size, x, num_values, row, block, column):
    largest = splat(0.0)
    for k in range(0, num_values, LANES):
        largest = maximum(largest, magnitude(load(element, x + k * size)))
    scale = lane_max(largest) / np.float32(127.0)
    inverse = splat(np.float32(1.0) / scale if scale > 0 else np.float32(0.0))
    for k in range(0, num_values, LANES):
        store(I8, row + k, load(element, x + k * size) * inverse)
    store_f32(block + num_values // 4 * TILE_BYTES + 4 * column, scale)


@kernel
def _pack_values(
    kind, element, source, size, num_rows, num_values, data, block_bytes, first, rounded, threads
):
    is_int8 = block_bytes == (num_values + 4) * COLUMNS
    num_words = num_values // 4 if is_int8 else num_values // 2
    begin, end = first // COLUMNS, (first + num_rows + COLUMNS - 1) // COLUMNS
    for thread in prange(threads):
        rows = rounded.ctypes.data + thread * COLUMNS * rounded.shape[2]
        from_block = begin + (end - begin) * thread // threads
        for block in range(from_block, begin + (end - begin) * (thread + 1) // threads):
            start, stop, column = _part_of_block(block, first, num_rows)
            target = data + block * block_bytes
            for i in range(start, stop):
                x = source + i * num_values * size
                row = rows + (i - start) * 4 * num_words
                _round_row(kind, element, size, x, num_values, row, target, column + i - start)
            flipped = _SIGNS if is_int8 else 0
            _interleave(rows, num_words, stop - start, target, column, flipped)


@kernel
def _pack_codes(
    codes, scale, minimum, num_rows, num_values, data, block_bytes, first, halves, threads
):
    begin, end = first // COLUMNS, (first + num_rows + COLUMNS - 1) // COLUMNS
    for thread in prange(threads):
        from_block = begin + (end - begin) * thread // threads
        for block in range(from_block, begin + (end - begin) * (thread + 1) // threads):
            start, stop, column = _part_of_block(block, first, num_rows)
            for group in range(num_values // GROUP):
                target = data + block * block_bytes + group * GROUP_BYTES
                for i in range(start, stop):
                    for word in range(4):
                        source = codes + i * num_values + group * GROUP + 8 * word
                        bits = load_i32(source) | load_i32(source + 4) << 4
                        place = target + word * TILE_BYTES + 4 * (column + i - start)
                        store_i32(place, bits)
                scales = (group * GROUP_BYTES + 4 * TILE_BYTES) // 2 + column
                for i in range(start, stop):
                    halves[block, scales + i - start] = scale[i, group]
                    halves[block, scales + COLUMNS + i - start] = minimum[i, group]
