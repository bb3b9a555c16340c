"""One split of decode attention on CPUs: 128 positions of a sequence, the queries of a kv head.

    scores[key, query] = K q         4 keys × 4 queries in registers, lanes are values of both
    weights[query, key pair]         softmax of this split alone
    o[query] = P V                   4 queries × 64 values in registers, lanes are values

What the splits of a query come to is put together in their order, by `combine`.
"""

from typing import NamedTuple

from bezel.kernels.cpu.attention_pages import Rows, list_rows
from bezel.kernels.cpu.attention_softmax import (
    exp2_below,
    keep_between,
    larger,
    most_over_keys,
    pair_key_words,
    sum_over_keys,
)
from bezel.kernels.cpu.attention_tiles import (
    LANE_BYTES,
    VALUE_BLOCK,
    add_lane_products,
    add_value_products,
    fold,
    lace,
    prefetch,
    store_words,
    zeros,
)
from bezel.kernels.cpu.jit import device
from bezel.kernels.cpu.lanes import (
    F32,
    LANES,
    load,
    load_i64,
    load_scalar,
    splat,
    store,
    store_f32,
    store_i64,
)
from bezel.kernels.cpu.rows import num_bytes

SPLIT = 128  # positions
KEYS = QUERIES = 4  # in registers
AHEAD = 8  # keys between what is asked for and what is read
LINE_BYTES = 64
NOTHING = -1e30  # a maximum without a key: finite, so that differences are numbers


class Call(NamedTuple):
    """Addresses, distances in bytes and numbers that all splits share."""

    q: int
    stride_q: int
    k_cache: int
    v_cache: int
    stride_page: int
    page_size: int
    table: int
    stride_table: int
    num_entries: int
    seq_lens: int
    out: int
    splits: int
    parts: int
    num_seqs: int
    num_kv_heads: int
    group: int
    q_len: int
    width: int
    value_dim: int
    window: int
    factor: float


class Split(NamedTuple):
    """What one thread keeps while it works on a split: addresses."""

    k_list: int
    v_list: int
    q_list: int
    first: int
    last: int
    scores: int


def scratch_bytes_of(num_rows: int) -> int:
    """Bytes of a `Split`, as `split_at` lays it out."""
    return 16 * SPLIT + 8 * num_rows + 2 * LANE_BYTES + 4 * num_rows * SPLIT


def part_bytes_of(num_rows: int, value_dim: int) -> int:
    """Bytes of what a split comes to: maxima and sums of each tile of queries, outputs."""
    return num_rows // QUERIES * 2 * LANE_BYTES + num_rows * value_dim * 4


@device
def padded_rows(num_rows):
    """Rows of whole tiles."""
    return -(-num_rows // QUERIES) * QUERIES


@device
def split_at(p, num_rows):
    rows = p + 16 * SPLIT + 8 * num_rows
    return Split(
        p,
        p + 8 * SPLIT,
        p + 16 * SPLIT,
        rows,
        rows + LANE_BYTES,
        rows + 2 * LANE_BYTES,
    )


@device
def extent(call, s):
    """First position that a sequence's queries see, and the end."""
    end = load_i64(call.seq_lens + 8 * s)
    first = 0
    if call.window > 0:
        first = max(0, end - call.q_len + 1 - call.window)
    return first, end


@device
def _prefetch(rows, row_bytes):
    """Rows of a tile of keys."""
    for key in range(KEYS):
        row = load_i64(rows + 8 * key)
        for offset in range(0, row_bytes, LINE_BYTES):
            prefetch(row + offset)


@device
def _score(element, split, num_keys, num_rows, row_bytes, value_bytes):
    for key in range(0, min(AHEAD, num_keys), KEYS):
        _prefetch(split.k_list + 8 * key, row_bytes)
    for key in range(0, num_keys, KEYS):
        # Pages lie far apart: the machine doesn't guess what comes next.
        if key + AHEAD < num_keys:
            _prefetch(split.k_list + 8 * (key + AHEAD), row_bytes)
        _prefetch(split.v_list + 8 * key, value_bytes)
        for row in range(0, num_rows, QUERIES):
            sums = zeros(KEYS, QUERIES)
            for offset in range(0, row_bytes, LANE_BYTES):
                p_k, p_q = split.k_list + 8 * key, split.q_list + 8 * row
                sums = add_lane_products(element, sums, p_k, p_q, offset)
            store(F32, split.scores + 4 * (row * SPLIT + key * QUERIES), fold(sums))


@device
def _hide(call, split, scores, row, base, num_keys, end):
    """−∞ for what the tile of queries from `row` on doesn't see."""
    for lane in range(LANES):
        key, query = divmod(lane, QUERIES)
        token = min((row + query) // call.group, call.q_len - 1)
        last = end - call.q_len + token
        first = last - call.window + 1 if call.window > 0 else 0
        store_f32(split.first + 4 * lane, float(first - base - key))
        store_f32(split.last + 4 * lane, float(last - base - key))
    first_lanes, last_lanes = load(F32, split.first), load(F32, split.last)
    for key in range(0, num_keys, KEYS):
        place = scores + 4 * QUERIES * key
        kept = keep_between(load(F32, place), splat(key), first_lanes, last_lanes)
        store(F32, place, kept)


@device
def _weigh(element, scores, num_keys, factor, stats):
    """Softmax of scores · factor, up to its denominator; words of weights take their place."""
    tile = zeros(KEYS, QUERIES)
    end = 4 * QUERIES * num_keys
    factors, most = splat(factor), splat(NOTHING)
    for i in range(0, end, LANE_BYTES):
        most = larger(load(F32, scores + i), most)
    most = most_over_keys(tile, most)
    sum_0, sum_1 = splat(0.0), splat(0.0)
    for i in range(0, end, 2 * LANE_BYTES):
        weight_0 = exp2_below(load(F32, scores + i), most, factors)
        weight_1 = exp2_below(load(F32, scores + i + LANE_BYTES), most, factors)
        sum_0, sum_1 = sum_0 + weight_0, sum_1 + weight_1
        if num_bytes(element) == 2:
            store(F32, scores + i // 2, pair_key_words(tile, weight_0, weight_1))
        else:
            store(F32, scores + i, weight_0)
            store(F32, scores + i + LANE_BYTES, weight_1)
    store(F32, stats, most)
    store(F32, stats + LANE_BYTES, sum_over_keys(tile, sum_0 + sum_1))


@device
def _add_values(element, v_list, weights, num_keys, value_dim, outputs):
    step, size = 4 // num_bytes(element), num_bytes(element)
    for column in range(0, value_dim, VALUE_BLOCK):
        sums = zeros(QUERIES, 4)
        for i in range(num_keys // step):
            even = load_i64(v_list + 8 * step * i) + column * size
            odd = load_i64(v_list + 8 * (step * i + step - 1)) + column * size
            laced = lace(element, even, odd)
            sums = add_value_products(element, sums, weights + 4 * QUERIES * i, laced)
        store_words(sums, outputs + 4 * column, 4 * value_dim)


@device
def attend_split(element, call, split, s, g, base, end, part):
    """One split, from position `base` on, of the queries of kv head `g`."""
    size = num_bytes(element)
    row_bytes = call.width * size
    num_rows = call.q_len * call.group
    padded = padded_rows(num_rows)
    head = g * row_bytes
    rows = Rows(
        call.k_cache + head,
        call.v_cache + head,
        call.stride_page,
        call.num_kv_heads * row_bytes,
        call.page_size,
        call.table + s * call.stride_table,
        call.num_entries,
        end,
        0,
        0,
        0,
        0,
    )
    # Whole pairs of lanes: 8 keys × 4 queries.
    num_keys = -(-min(SPLIT, end - base) // (2 * KEYS)) * 2 * KEYS
    list_rows(rows, base, num_keys, end, split.k_list, split.v_list)
    for row in range(padded):
        # Rows without a query of their own repeat the last one.
        token, head = divmod(min(row, num_rows - 1), call.group)
        q = call.q + (s * call.q_len + token) * call.stride_q
        store_i64(split.q_list + 8 * row, q + (g * call.group + head) * row_bytes)
    _score(element, split, num_keys, padded, row_bytes, call.value_dim * size)
    stats = part
    outputs = part + padded // QUERIES * 2 * LANE_BYTES
    for row in range(0, padded, QUERIES):
        scores = split.scores + 4 * SPLIT * row
        if call.q_len > 1 or base + num_keys > end:
            _hide(call, split, scores, row, base, num_keys, end)
        _weigh(element, scores, num_keys, call.factor, stats)
        _add_values(element, split.v_list, scores, num_keys, call.value_dim, outputs)
        stats += 2 * LANE_BYTES
        outputs += 4 * QUERIES * call.value_dim


@device
def combine(element, call, s, g, part, part_bytes, count, row):
    """Put together what `count` splits, one after the other from `part` on, came to for a row."""
    value_dim = call.value_dim
    num_rows = call.q_len * call.group
    token, head = divmod(row, call.group)
    i_row = (s * call.q_len + token) * call.num_kv_heads * call.group + g * call.group + head
    out = call.out + i_row * value_dim * num_bytes(element)
    if count == 0:
        for d in range(0, value_dim, LANES):
            store(element, out + d * num_bytes(element), splat(0.0))
        return
    stats = part + row // QUERIES * 2 * LANE_BYTES + row % QUERIES * 4
    outputs = part + padded_rows(num_rows) // QUERIES * 2 * LANE_BYTES + 4 * value_dim * row
    factors = splat(call.factor)
    most = splat(NOTHING)
    for i in range(count):
        most = larger(splat(load_scalar(F32, stats + i * part_bytes)), most)
    total = splat(0.0)
    for i in range(count):
        p = i * part_bytes
        weight = exp2_below(splat(load_scalar(F32, stats + p)), most, factors)
        total = total + splat(load_scalar(F32, stats + p + LANE_BYTES)) * weight
        # The first part is the sum of all so far.
        for d in range(0, 4 * value_dim, LANE_BYTES):
            weighted = load(F32, outputs + p + d) * weight
            if i > 0:
                weighted = load(F32, outputs + d) + weighted
            store(F32, outputs + d, weighted)
    scale = splat(1.0) / total
    for d in range(0, value_dim, LANES):
        store(element, out + d * num_bytes(element), load(F32, outputs + 4 * d) * scale)
