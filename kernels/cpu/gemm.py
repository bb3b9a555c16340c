"""Matrix products with packed weights, for any number of rows.

    y[m, n] = Σ_k x[m, k] · w[n, k]

A task is a run of blocks of 64 columns times as many rows of x as stay in the second-level cache
beside one. The threads take tasks one after the other, so a thread that is held up by another
program gets fewer of them. The sum over k has the same order whatever the number of rows: a row's
result doesn't depend on the batch.

Which kind of weight it is says the type of `weight`: BF16, BF16_F32, I8 or I4. Their blocks of 64
columns:

    BF16   [ K/2 words ]                                    BF16_F32 the same, with x in float32
    I8     [ K/4 words | 64 scales, float32 ]               w = scale · (code − 128)
    I4     K/32 × [ 4 words | 64 scales | 64 minima ]       w = scale · code − minimum, float16 both

For I8 and I4 the rows of x are int8 codes, and each 32 of them have a factor, float32. Behind it
stands 128 · (their sum), int32, for I8 and factor · (their sum), float32, for I4.
"""

import numpy as np
from numba import prange, types
from numba.extending import overload

from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import (
    BF16,
    F16,
    I8,
    LANES,
    has_feature,
    lane_max,
    lane_sum,
    load,
    load_i32,
    magnitude,
    maximum,
    splat,
    store,
    store_f32,
    store_i32,
    take_next,
)
from bezel.kernels.cpu.rows import num_bytes, serial, share
from bezel.kernels.cpu.tiles import (
    NUM_COLUMNS,
    TILE_BYTES,
    add_scaled,
    add_weighted,
    columns_of,
    dot_bf16,
    dot_bf16_f32,
    dot_int4,
    dot_int8,
    negative_sums,
    scale_columns,
    store_tile,
    subtract_outer,
    whole_sums,
    zero_sums,
    zero_tile,
)
from bezel.kernels.packed import COLUMNS, GROUP

I4, BF16_F32 = np.uint8(0), np.int16(0)
_LONGEST_RUN, _SHARES = 16, 16
# Lanes of columns that tiles of three rows and more have, so that their sums just fill the
# registers; INT8 has two of each sum, one a float. Tiles of fewer rows wait for memory, and read it
# in its order.
_IS_WIDE = has_feature("avx512f")
_TALL_COLUMNS = {types.int8: 2} if _IS_WIDE else {}
_OTHER_TALL_COLUMNS = NUM_COLUMNS if _IS_WIDE else 1
# Rows of the tallest tiles; INT4 needs registers for more of a word.
MOST_ROWS, MOST_INT4_ROWS = 6, 3 if _IS_WIDE else 6
GROUP_BYTES = 4 * TILE_BYTES + 2 * 2 * COLUMNS  # of I4: words, scales, minima


def _multiply(
    weight, element, tile, x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch, column
):
    """One tile of y, from lane `column` of the block on; the overloads below are its bodies."""


@overload(_multiply)
def _multiply_kind(
    weight, element, tile, x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch, column
):
    if weight == types.uint16:
        return _multiply_bf16
    if weight == types.int16:
        return _multiply_bf16_f32
    return _multiply_int8 if weight == types.int8 else _multiply_int4


def _multiply_bf16(
    weight, element, tile, x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch, column
):
    w += 4 * LANES * column
    for k in range(num_words):
        tile = dot_bf16(tile, w + TILE_BYTES * k, x + 4 * k, x_pitch)
    store_tile(element, y + LANES * column * num_bytes(element), y_pitch, tile)


def _multiply_bf16_f32(
    weight, element, tile, x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch, column
):
    w += 4 * LANES * column
    for k in range(num_words):
        tile = dot_bf16_f32(tile, w + TILE_BYTES * k, x + 8 * k, x_pitch)
    store_tile(element, y + LANES * column * num_bytes(element), y_pitch, tile)


def _multiply_int8(
    weight, element, tile, x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch, column
):
    w += 4 * LANES * column
    first = w
    for _ in range(num_words // 8):
        sums = negative_sums(tile, factors + 4, factor_pitch)
        for k in range(8):
            sums = dot_int8(sums, w + TILE_BYTES * k, x + 4 * k, x_pitch)
        tile = add_weighted(tile, sums, factors, factor_pitch)
        w += 8 * TILE_BYTES
        x += GROUP
        factors += 8
    tile = scale_columns(tile, first + TILE_BYTES * num_words)
    store_tile(element, y + LANES * column * num_bytes(element), y_pitch, tile)


def _multiply_int4(
    weight, element, tile, x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch, column
):
    w += 4 * LANES * column
    for _ in range(num_words // 4):
        sums = zero_sums(tile)
        for k in range(4):
            sums = dot_int4(sums, w + TILE_BYTES * k, x + 8 * k, x_pitch)
        scales = w + 4 * TILE_BYTES - 2 * LANES * column  # two bytes each, not four
        tile = add_scaled(tile, whole_sums(sums), F16, scales, factors, factor_pitch)
        tile = subtract_outer(tile, F16, scales + 128, factors + 4, factor_pitch)
        w += GROUP_BYTES
        x += GROUP
        factors += 8
    store_tile(element, y + LANES * column * num_bytes(element), y_pitch, tile)


def bfloat16_kind(element):
    """What weights in bfloat16 are to rows of an element."""
    return BF16 if element.dtype == np.uint16 else BF16_F32


@overload(bfloat16_kind)
def _bfloat16_kind(element):
    return (lambda element: BF16) if element == types.uint16 else (lambda element: BF16_F32)


def _tall_tile(weight, num_rows):
    """Zeros, for a constant number of rows."""


@overload(_tall_tile, prefer_literal=True)
def _tall_tile_of_kind(weight, num_rows):
    columns = _TALL_COLUMNS.get(weight, _OTHER_TALL_COLUMNS)
    return lambda weight, num_rows: zero_tile(num_rows, columns)


@device
def _multiply_columns(
    weight, element, tile, x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch
):
    """64 columns, as many at a time as a tile has."""
    for column in range(0, NUM_COLUMNS, columns_of(tile)):
        _multiply(
            weight, element, tile,
            x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch, column,
        )  # fmt: skip


@device
def multiply_block(
    weight,
    element,
    x,
    x_pitch,
    factors,
    factor_pitch,
    w,
    num_words,
    y,
    y_pitch,
    num_rows,
    most_rows,
):
    """64 columns of `num_rows` rows of y, in tiles of up to `most_rows` rows."""
    while num_rows > 0:
        if num_rows >= 6 and most_rows >= 6:
            step = 6
            _multiply_columns(
                weight, element, _tall_tile(weight, 6),
                x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch,
            )  # fmt: skip
        elif num_rows >= 3:
            step = 3
            _multiply_columns(
                weight, element, _tall_tile(weight, 3),
                x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch,
            )  # fmt: skip
        elif num_rows == 2:
            step = 2
            _multiply_columns(
                weight, element, zero_tile(2, NUM_COLUMNS),
                x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch,
            )  # fmt: skip
        else:
            step = 1
            _multiply_columns(
                weight, element, zero_tile(1, NUM_COLUMNS),
                x, x_pitch, factors, factor_pitch, w, num_words, y, y_pitch,
            )  # fmt: skip
        num_rows -= step
        x += step * x_pitch
        factors += step * factor_pitch
        y += step * y_pitch


@device
def blocks_of_task(num_rows, num_blocks, rows_at_once):
    """Blocks that a thread takes together. Few rows wait for memory, which is read faster in long
    runs than by threads that each skip the other's blocks; many rows share a block of w."""
    if num_rows > rows_at_once:
        return 1
    return max(1, min(_LONGEST_RUN, num_blocks // _SHARES))


@device
def multiply_tasks(
    next_task,
    weight,
    element,
    x,
    x_pitch,
    factors,
    factor_pitch,
    w,
    block_bytes,
    num_words,
    y,
    y_pitch,
    num_rows,
    num_blocks,
    rows_at_once,
    most_rows,
    element_bytes,
):
    """Take tasks until none is left; pitches in bytes."""
    run = blocks_of_task(num_rows, num_blocks, rows_at_once)
    num_runs = (num_blocks + run - 1) // run
    num_tasks = num_runs * ((num_rows + rows_at_once - 1) // rows_at_once)
    task = take_next(next_task)
    while task < num_tasks:
        first = task % num_runs * run
        row = task // num_runs * rows_at_once
        for block in range(first, min(first + run, num_blocks)):
            multiply_block(
                weight,
                element,
                x + row * x_pitch,
                x_pitch,
                factors + row * factor_pitch,
                factor_pitch,
                w + block * block_bytes,
                num_words,
                y + row * y_pitch + block * COLUMNS * element_bytes,
                y_pitch,
                min(rows_at_once, num_rows - row),
                most_rows,
            )
        task = take_next(next_task)


@kernel
def multiply(threads, num_rows, *numbers):
    """y of all rows and blocks."""
    counter = np.zeros(1, np.int64)
    next_task = counter.ctypes.data
    for _thread in prange(threads):
        multiply_tasks(next_task, *numbers)


@device
def quantize_values(element, x, codes, num_values, element_bytes):
    """int8 codes of neighbouring values, the factor that turns them back, and their sum."""
    largest = splat(0.0)
    for k in range(0, num_values, 16):
        largest = maximum(largest, magnitude(load(element, x + k * element_bytes)))
    factor = lane_max(largest) / np.float32(127.0)
    inverse = splat(np.float32(1.0) / factor if factor > 0 else np.float32(0.0))
    total = splat(0.0)
    for k in range(0, num_values, 16):
        store(I8, codes + k, load(element, x + k * element_bytes) * inverse)
        total = total + load(I8, codes + k)
    return factor, lane_sum(total)


@serial
def quantize_rows(
    first, last, element, x, x_pitch, codes, factors, num_values, for_int4, element_bytes
):
    """Rows of x as int8, with their factors as I8 or I4 weights want them."""
    num_groups = num_values // GROUP
    for row in range(first, last):
        source, target = x + row * x_pitch, codes + row * num_values
        for group in range(num_groups):
            begin = group * GROUP
            factor, total = quantize_values(
                element, source + begin * element_bytes, target + begin, GROUP, element_bytes
            )
            place = factors + 8 * (row * num_groups + group)
            store_f32(place, factor)
            if for_int4:
                store_f32(place + 4, factor * total)
            else:
                store_i32(place + 4, np.int32(total) * 128)


@kernel
def quantize_all(threads, num_rows, *numbers):
    for i in prange(threads):
        quantize_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *numbers)


@device
def multiply_block_tasks(
    next_task,
    weight,
    element,
    x,
    x_pitch,
    factors,
    factor_pitch,
    w,
    matrix_bytes,
    block_bytes,
    num_words,
    y,
    y_pitch,
    row_blocks,
    num_row_blocks,
    num_blocks,
    most_rows,
    element_bytes,
):
    """Rows [first, end) of x times matrix i of a stack, for each of `row_blocks`: (i, first, end).

    Those of a negative i come last and are left out.
    """
    run = blocks_of_task(1, num_row_blocks * num_blocks, 1)
    num_runs = (num_blocks + run - 1) // run
    task = take_next(next_task)
    while task < num_row_blocks * num_runs:
        first, row_block = task % num_runs * run, row_blocks + 12 * (task // num_runs)
        matrix, row = load_i32(row_block), load_i32(row_block + 4)
        if matrix < 0:
            break
        for block in range(first, min(first + run, num_blocks)):
            multiply_block(
                weight,
                element,
                x + row * x_pitch,
                x_pitch,
                factors + row * factor_pitch,
                factor_pitch,
                w + matrix * matrix_bytes + block * block_bytes,
                num_words,
                y + row * y_pitch + block * COLUMNS * element_bytes,
                y_pitch,
                load_i32(row_block + 8) - row,
                most_rows,
            )
        task = take_next(next_task)


@kernel
def multiply_row_blocks(threads, num_rows, *numbers):
    counter = np.zeros(1, np.int64)
    next_task = counter.ctypes.data
    for _thread in prange(threads):
        multiply_block_tasks(next_task, *numbers)
