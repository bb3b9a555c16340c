"""One block of prefill attention on CPUs: 48 rows that share a kv head, against the keys they see.

A row is a query head of a token. Keys are met at most 384 at a time, in three steps:

    scores[key, row] = K q           8 keys × 48 rows in registers, lanes are rows
    weights[row, key pair]           softmax as far as it is known: maxima, sums, rescaling
    o[row] = o[row] · rescale + P V  6 rows × 64 values in registers, lanes are values
"""

from typing import NamedTuple

from bezel.kernels.cpu.attention_pages import list_rows
from bezel.kernels.cpu.attention_softmax import exp2_below, keep_between, larger, pair_words
from bezel.kernels.cpu.attention_tiles import (
    LANE_BYTES,
    VALUE_BLOCK,
    WORD_BYTES,
    add_tiles,
    add_value_products,
    add_word_products,
    lace,
    load_words,
    scale_rows,
    store_word,
    store_words,
    zeros,
)
from bezel.kernels.cpu.jit import device
from bezel.kernels.cpu.lanes import F32, LANES, load, load_i64, load_scalar, splat, store, store_f32
from bezel.kernels.cpu.rows import num_bytes

COLUMNS = 3  # lanes of rows
ROWS = COLUMNS * LANES
KEY_TILE, VALUE_TILE = 8, 6  # keys, and rows, in registers
MOST_KEYS, MOST_WORDS = 384, 128  # in one sum
PITCH = ROWS * WORD_BYTES  # of what is kept for all rows
NOTHING = -1e30  # a maximum before the first key: finite, so that differences are numbers


class Block(NamedTuple):
    """What one thread keeps while it works on a block: addresses."""

    k_list: int
    v_list: int
    first: int
    last: int
    maxima: int
    sums: int
    rescale: int
    queries: int
    scores: int
    weights: int
    values: int
    outputs: int


def scratch_bytes_of(width_bytes: int, value_dim: int) -> int:
    """Bytes of a `Block`, as `block_at` lays it out."""
    rows = 5 + width_bytes // WORD_BYTES + 2 * MOST_KEYS
    return 16 * MOST_KEYS + PITCH * rows + 4 * (VALUE_BLOCK * MOST_KEYS + value_dim * ROWS)


@device
def block_at(p, num_words):
    rows = p + 16 * MOST_KEYS
    queries = rows + 5 * PITCH
    scores = queries + PITCH * num_words
    weights = scores + PITCH * MOST_KEYS
    values = weights + PITCH * MOST_KEYS
    return Block(
        p,
        p + 8 * MOST_KEYS,
        rows,
        rows + PITCH,
        rows + 2 * PITCH,
        rows + 3 * PITCH,
        rows + 4 * PITCH,
        queries,
        scores,
        weights,
        values,
        values + 4 * VALUE_BLOCK * MOST_KEYS,
    )


@device
def _score(element, zero, k_list, num_keys, queries, num_words, scores):
    for key in range(0, num_keys, KEY_TILE):
        place = scores + PITCH * key
        # In parts: a long sum would lose what is small beside what has been added up already.
        for first in range(0, num_words, MOST_WORDS):
            sums = zero
            for word in range(first, min(first + MOST_WORDS, num_words)):
                p_k, p_q = k_list + 8 * key, queries + PITCH * word
                sums = add_word_products(element, sums, p_k, WORD_BYTES * word, p_q)
            if first > 0:
                sums = add_tiles(sums, load_words(sums, place, PITCH))
            store_words(sums, place, PITCH)


@device
def _hide(block, base, num_keys, num_columns):
    """−∞ for what a row doesn't see: key `base` + n against the row's first and last."""
    for c in range(0, num_columns * LANE_BYTES, LANE_BYTES):
        first, last = load(F32, block.first + c), load(F32, block.last + c)
        for n in range(num_keys):
            place = block.scores + PITCH * n + c
            store(F32, place, keep_between(load(F32, place), splat(base + n), first, last))


@device
def _weigh(element, block, num_keys, num_columns, factor):
    """Softmax of scores · factor, and what it makes of what came before."""
    step = 4 // num_bytes(element)
    factors = splat(factor)
    for c in range(0, num_columns * LANE_BYTES, LANE_BYTES):
        scores, words = block.scores + c, block.weights + c
        old = load(F32, block.maxima + c)
        new_0, new_1 = old, old
        for n in range(0, num_keys, 2):
            new_0 = larger(load(F32, scores + PITCH * n), new_0)
            new_1 = larger(load(F32, scores + PITCH * n + PITCH), new_1)
        new = larger(new_0, new_1)
        rescale = exp2_below(old, new, factors)
        sum_0, sum_1 = load(F32, block.sums + c) * rescale, splat(0.0)
        for n in range(0, num_keys, 2):
            even = exp2_below(load(F32, scores + PITCH * n), new, factors)
            odd = exp2_below(load(F32, scores + PITCH * n + PITCH), new, factors)
            sum_0, sum_1 = sum_0 + even, sum_1 + odd
            if step == 2:
                store(F32, words + PITCH * (n // 2), pair_words(even, odd))
            else:
                store(F32, words + PITCH * n, even)
                store(F32, words + PITCH * n + PITCH, odd)
        store(F32, block.maxima + c, new)
        store(F32, block.sums + c, sum_0 + sum_1)
        store(F32, block.rescale + c, rescale)


@device
def _add_values(element, block, num_keys, num_rows, value_dim, is_first):
    step = 4 // num_bytes(element)
    num_steps = num_keys // step
    pitch = 4 * value_dim
    for column in range(0, value_dim, VALUE_BLOCK):
        for i in range(num_steps):
            even = load_i64(block.v_list + 8 * step * i)
            odd = load_i64(block.v_list + 8 * (step * i + step - 1))
            start = column * num_bytes(element)
            laced = lace(element, even + start, odd + start)
            store_words(laced, block.values + 4 * VALUE_BLOCK * i, 0)
        for row in range(0, num_rows, VALUE_TILE):
            outputs = block.outputs + pitch * row + 4 * column
            sums = zeros(VALUE_TILE, 4)
            if not is_first:
                sums = scale_rows(load_words(sums, outputs, pitch), block.rescale + 4 * row)
            for i in range(num_steps):
                values = load_words(zeros(1, 4), block.values + 4 * VALUE_BLOCK * i, 0)
                weights = block.weights + PITCH * i + 4 * row
                sums = add_value_products(element, sums, weights, values)
            store_words(sums, outputs, pitch)


class Chunk(NamedTuple):
    """Queries of one sequence and kv head: addresses, distances in bytes, and positions."""

    q: int
    stride_token: int
    stride_head: int
    out: int
    out_stride_token: int
    out_stride_head: int
    start: int
    num_tokens: int
    group: int
    window: int
    last_keys: int


@device
def _begin(block, chunk, token, num_rows, num_words):
    """Lay out the queries of the tokens from `token` on; the first and the end of their keys."""
    begin, end = chunk.start + token, 0
    if chunk.window > 0:
        begin = max(0, begin - chunk.window + 1)
    else:
        begin = 0
    for row in range(ROWS):
        # Lanes without a query of their own repeat the last one.
        t, head = divmod(min(row, num_rows - 1), chunk.group)
        position = chunk.start + token + t
        last = position
        if chunk.last_keys != 0:
            last = load_i64(chunk.last_keys + 8 * (token + t))
        end = max(end, last + 1)
        first = position - chunk.window + 1 if chunk.window > 0 else 0
        store_f32(block.first + 4 * row, float(first - begin))
        store_f32(block.last + 4 * row, float(last - begin))
        store_f32(block.maxima + 4 * row, NOTHING)
        store_f32(block.sums + 4 * row, 0.0)
        q = chunk.q + (token + t) * chunk.stride_token + head * chunk.stride_head
        for word in range(num_words):
            store_word(block.queries + PITCH * word + 4 * row, q + 4 * word)
    return begin, end


@device
def attend_block(element, block, rows, chunk, token, num_rows, num_words, value_dim, factor):
    begin, end = _begin(block, chunk, token, num_rows, num_words)
    num_columns = -(-num_rows // LANES)
    num_blocks = -(-(end - begin) // MOST_KEYS)
    # Blocks of about one size: a small rest would cost what a whole block does.
    most = -(-(end - begin) // (num_blocks * KEY_TILE)) * KEY_TILE
    first_full, last_full = begin, chunk.start + token
    if chunk.window > 0:
        first_full = chunk.start + token + (num_rows - 1) // chunk.group - chunk.window + 1
    for base in range(begin, end, most):
        num_keys = -(-min(most, end - base) // KEY_TILE) * KEY_TILE
        list_rows(rows, base, num_keys, end, block.k_list, block.v_list)
        scores = (block.k_list, num_keys, block.queries, num_words, block.scores)
        if num_columns == 1:
            _score(element, zeros(KEY_TILE, 1), *scores)
        elif num_columns == 2:
            _score(element, zeros(KEY_TILE, 2), *scores)
        else:
            _score(element, zeros(KEY_TILE, 3), *scores)
        if base < first_full or base + num_keys - 1 > last_full:
            _hide(block, base - begin, num_keys, num_columns)
        _weigh(element, block, num_keys, num_columns, factor)
        _add_values(element, block, num_keys, num_rows, value_dim, base == begin)
    _finish(element, block, chunk, token, num_rows, value_dim)


@device
def _finish(element, block, chunk, token, num_rows, value_dim):
    for row in range(num_rows):
        t, head = divmod(row, chunk.group)
        out = chunk.out + (token + t) * chunk.out_stride_token + head * chunk.out_stride_head
        scale = splat(1.0 / load_scalar(F32, block.sums + 4 * row))
        o = block.outputs + 4 * value_dim * row
        for d in range(0, value_dim, LANES):
            store(element, out + d * num_bytes(element), load(F32, o + 4 * d) * scale)
