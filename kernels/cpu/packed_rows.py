"""Rows of packed weights as plain values: embeddings, whose table is the output head as well."""

import numpy as np
from numba import prange, types
from numba.extending import overload

from bezel.kernels.cpu.gemm import GROUP_BYTES
from bezel.kernels.cpu.jit import kernel
from bezel.kernels.cpu.lanes import (
    BF16,
    F16,
    F32,
    I8,
    LANES,
    load,
    load_i64,
    load_scalar,
    splat,
    store,
    store_f32,
)
from bezel.kernels.cpu.rows import serial, share
from bezel.kernels.cpu.tiles import TILE_BYTES
from bezel.kernels.packed import COLUMNS, GROUP


def _value(weight, block, column, num_values, k):
    """Value k of one of a block's 64 columns."""


@overload(_value)
def _value_of_kind(weight, block, column, num_values, k):
    if weight == types.uint16:
        return _bfloat
    return _int8 if weight == types.int8 else _int4


def _bfloat(weight, block, column, num_values, k):
    return load_scalar(BF16, block + k // 2 * TILE_BYTES + 4 * column + 2 * (k % 2))


def _int8(weight, block, column, num_values, k):
    code = int(load_scalar(I8, block + k // 4 * TILE_BYTES + 4 * column + k % 4)) & 255
    scale = load_scalar(F32, block + num_values // 4 * TILE_BYTES + 4 * column)
    return scale * np.float32(code - 128)


def _int4(weight, block, column, num_values, k):
    group = block + k // GROUP * GROUP_BYTES
    pair = int(load_scalar(I8, group + k % GROUP // 8 * TILE_BYTES + 4 * column + k % 4)) & 255
    code = pair >> 4 if k % 8 >= 4 else pair & 15
    scales = group + 4 * TILE_BYTES + 2 * column
    return np.float32(code) * load_scalar(F16, scales) - load_scalar(F16, scales + 2 * COLUMNS)


@serial
def unpack_rows(
    first, last, weight, element, ids, w, block_bytes, values, y, element_bytes, num_values, scale
):
    """y[r] = scale · w[ids[r]]; `values` has room for the float32 values of all rows."""
    factor = splat(scale)
    for row in range(first, last):
        token_id = load_i64(ids + 8 * row)
        block, column = w + token_id // COLUMNS * block_bytes, token_id % COLUMNS
        source, target = values + 4 * row * num_values, y + row * num_values * element_bytes
        for k in range(num_values):
            store_f32(source + 4 * k, _value(weight, block, column, num_values, k))
        for k in range(0, num_values, LANES):
            place = target + k * element_bytes
            store(element, place, load(F32, source + 4 * k))
            store(element, place, load(element, place) * factor)


@kernel
def unpack_all(threads, num_rows, *numbers):
    for i in prange(threads):
        unpack_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *numbers)
