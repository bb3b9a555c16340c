"""The largest logits of a row, without sorting it: lists that `sampling` and `logprobs` search.

A row's tokens are ordered by falling logit, equal ones by rising token id; NaN counts as −inf. The
place of a token in that order is its key, an integer that no other token of the row has:

    key = logit as an integer that rises with it · 2²⁴ + (2²⁴ − 1 − token id)

The k-th largest of many maxima is a lower bound of the k-th largest logit, and hardly lower if
there are many more than k. Each of a row's NUM_COLUMNS columns gives one maximum; columns and not
stretches of neighbours, because likely tokens often stand together:

    logits of a row, as a table of R × columns        1  maximum of each column     reads the row
      ┌ block 0 ┬ block 1 ┬ … ┐                       2  floor = k-th largest       reads maxima
      │ 0 1 2 … │         │   │  one program a block  3  logits ≥ floor, up to SLOTS of a block, and
      │ C C+1 … │         │   │  (2: one a row)          their number               reads columns
      └─────────┴─────────┴───┘                          whose maximum reaches the floor

With random logits little more than k are listed. Should many be equal, or huddle in a column, a
block has more than SLOTS of them; then its row's list is worthless, and the whole row is searched
in its place. So every count is right, and none is read by the host.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bezel.kernels.jit import tl, triton

TOP_K_BLOCK = 32  # of the reference
NUM_COLUMNS = 8192
BLOCK_COLUMNS = 64
SLOTS = 32
CHUNK = 4096  # places of a list or a row that a program looks at together
NUM_WARPS = 8  # of a program that looks at CHUNK
MAX_TOP_K = 1024  # the columns have to be many more
MAX_VOCAB_SIZE = 1 << 24  # what a key has room for


class Candidates(NamedTuple):
    """For each row N blocks of slots, of which the first `counts` hold a logit and a token id.

    A count above SLOTS, or below the number of logits asked for, says that the row itself has to
    be searched. values_NS float32; tokens_NS, counts_NB int32.
    """

    values_NS: Tensor
    tokens_NS: Tensor
    counts_NB: Tensor


def largest(logits_SV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest float32 logits in rank order, and their token ids (int64): S×k each.

    They lie in the k blocks with the largest maxima, so only those need sorting.
    """
    num_rows, vocab_size = logits_SV.shape
    if k == vocab_size:
        return torch.sort(logits_SV, dim=-1, descending=True, stable=True)
    if vocab_size % TOP_K_BLOCK or 2 * k * TOP_K_BLOCK > vocab_size:
        ids_SK = _first_in_rank(logits_SV, torch.arange(vocab_size), k)
    else:
        maxima_SB = logits_SV.view(num_rows, -1, TOP_K_BLOCK).amax(-1)
        chosen_SK = _first_in_rank(maxima_SB, torch.arange(maxima_SB.shape[1]), k)
        ids_SC = (chosen_SK[..., None] * TOP_K_BLOCK + torch.arange(TOP_K_BLOCK)).flatten(1)
        ids_SK = _first_in_rank(logits_SV.gather(1, ids_SC), ids_SC, k)
    return logits_SV.gather(1, ids_SK), ids_SK


def _first_in_rank(values_SC: Tensor, ids_SC: Tensor, k: int) -> Tensor:
    """Ids of the k largest values, the lower id first among equals.

    `topk` of the values alone may take any of several equal ones. So it gets integers that rise
    with a value in their upper halves, and fall with its id in their lower ones.
    """
    bits_SC = (values_SC + 0.0).view(torch.int32)  # −0 becomes 0
    rising_SC = bits_SC ^ ((bits_SC >> 31) & 0x7FFFFFFF)
    keys_SC = (rising_SC.long() << 32) - ids_SC
    return -keys_SC.topk(k, dim=-1).values & 0xFFFFFFFF


@triton.jit
def load_logits(ptrs, mask):
    b_value = tl.load(ptrs, mask=mask, other=-float("inf")).to(tl.float32)
    return tl.where(b_value == b_value, b_value, -float("inf"))


@triton.jit
def rank_key(b_value, b_token):
    """Keys (int64, not negative) of float32 logits without NaN."""
    # −0 and 0 are equal and have different bits.
    b_bits = tl.where(b_value == 0.0, 0.0, b_value).to(tl.int32, bitcast=True)
    b_rising = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits).to(tl.int64)
    return ((b_rising + 0x80000000) << 24) + (0xFFFFFF - b_token)


@triton.jit
def key_value(key):
    """The logit of a key."""
    rising = ((key >> 24) - 0x80000000).to(tl.int32)
    return tl.where(rising < 0, rising ^ 0x7FFFFFFF, rising).to(tl.float32, bitcast=True)


@triton.jit
def key_token(key):
    return 0xFFFFFF - (key & 0xFFFFFF)


@triton.jit
def load_candidates(source, start, CHUNK: tl.constexpr):
    """(logits, token ids, keys) of CHUNK places of a source; keys are −1 beyond its end.

    A source is (row, values, tokens, counts, is_list, size, slots): where a row's logits stand,
    where its list does, and which of the two has to be searched up to which place.
    """
    row_ptr, values_ptr, tokens_ptr, counts_ptr, is_list, size, slots = source
    o = start + tl.arange(0, CHUNK)
    if is_list:
        # [CHUNK], each count for all slots of its block
        b_count = tl.load(counts_ptr + o // slots, mask=o < size, other=0).to(tl.int32)
        m = o % slots < b_count
        # [CHUNK]
        b_value = tl.load(values_ptr + o, mask=m, other=-float("inf")).to(tl.float32)
        # [CHUNK]
        b_token = tl.load(tokens_ptr + o, mask=m, other=0).to(tl.int32)
    else:
        m = o < size
        # [CHUNK]
        b_value = load_logits(row_ptr + o, m)
        b_token = o
    return b_value, b_token, tl.where(m, rank_key(b_value, b_token), -1)


@triton.jit
def extreme_keys(source, CHUNK: tl.constexpr):
    """The smallest and the largest key; the first is above the second if there is none."""
    b_low = tl.full([CHUNK], 0x7FFFFFFFFFFFFFFF, tl.int64)
    b_high = tl.full([CHUNK], -1, tl.int64)
    for start in range(0, source[5], CHUNK):
        _, _, b_key = load_candidates(source, start, CHUNK)
        b_low = tl.minimum(b_low, tl.where(b_key < 0, b_low, b_key))
        b_high = tl.maximum(b_high, b_key)
    return tl.min(b_low, 0), tl.max(b_high, 0)


@triton.jit
def split_at(source, pivot, peak, temperature, BY_MASS: tl.constexpr, CHUNK: tl.constexpr):
    """Of the keys from `pivot` on how many there are, or the sum of e^((logit − peak) / T); the
    smallest of them; and the largest below."""
    b_mass = tl.zeros([CHUNK], tl.float32)
    b_above = tl.full([CHUNK], 0x7FFFFFFFFFFFFFFF, tl.int64)
    b_below = tl.full([CHUNK], -1, tl.int64)
    for start in range(0, source[5], CHUNK):
        b_value, _, b_key = load_candidates(source, start, CHUNK)
        b_is_above = b_key >= pivot
        if BY_MASS:
            b_mass += tl.where(b_is_above, tl.exp((b_value - peak) / temperature), 0.0)
        else:
            b_mass += b_is_above.to(tl.float32)
        b_above = tl.minimum(b_above, tl.where(b_is_above, b_key, b_above))
        b_below = tl.maximum(b_below, tl.where(b_is_above, b_below, b_key))
    return tl.sum(b_mass, 0), tl.min(b_above, 0), tl.max(b_below, 0)


@triton.jit
def boundary_key(
    source, low, high, target, peak, temperature, BY_MASS: tl.constexpr, CHUNK: tl.constexpr
):
    """The largest key, from `low` to `high`, that weighs `target` with all above it; else `low`.

    Halves the interval until it holds one key. Its ends are keys that exist, which jumps over the
    gaps between them: a dozen passes as a rule, at most 56.
    """
    while low < high:
        pivot = low + (high - low + 1) // 2
        mass, above, below = split_at(source, pivot, peak, temperature, BY_MASS, CHUNK)
        low = tl.where(mass >= target, above, low)
        high = tl.where(mass >= target, high, below)
    return low


@triton.jit
def _column_maxima_kernel(
    logits_ptr,
    rows_ptr,
    maxima_ptr,
    stride_ls,
    V,
    num_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + tl.load(rows_ptr + i_n) * stride_ls
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_v = tl.arange(0, BLOCK_R)[:, None] * num_columns + o_c[None, :]
    # [BLOCK_R, BLOCK_C]
    b_value = load_logits(row_ptr + o_v, (o_v < V) & (o_c < num_columns)[None, :])
    tl.store(maxima_ptr + i_n * num_columns + o_c, tl.max(b_value, 0), mask=o_c < num_columns)


@triton.jit
def _floor_kernel(maxima_ptr, rows_ptr, top_k_ptr, floor_ptr, num_columns, CHUNK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    row_ptr = maxima_ptr + i_n * num_columns
    top_k = tl.load(top_k_ptr + tl.load(rows_ptr + i_n))
    source = (row_ptr, row_ptr, row_ptr, row_ptr, False, num_columns, 1)
    low, high = extreme_keys(source, CHUNK)
    key = boundary_key(source, low, high, top_k, 0.0, 1.0, False, CHUNK)
    tl.store(floor_ptr + i_n, key_value(key))


@triton.jit
def _gather_kernel(
    logits_ptr,
    rows_ptr,
    maxima_ptr,
    floor_ptr,
    values_ptr,
    tokens_ptr,
    counts_ptr,
    stride_ls,
    V,
    num_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLOTS: tl.constexpr,
):
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_ptr = logits_ptr + tl.load(rows_ptr + i_n) * stride_ls
    floor = tl.load(floor_ptr + i_n)
    o_c = i_b * BLOCK_C + tl.arange(0, BLOCK_C)
    o_v = tl.arange(0, BLOCK_R)[:, None] * num_columns + o_c[None, :]
    # [BLOCK_C]
    b_maximum = tl.load(
        maxima_ptr + i_n * num_columns + o_c, mask=o_c < num_columns, other=-float("inf")
    )
    m_c = (b_maximum >= floor) & (o_c < num_columns)
    # [BLOCK_R, BLOCK_C], few of them
    b_value = load_logits(row_ptr + o_v, (o_v < V) & m_c[None, :])
    b_value = tl.reshape(b_value, [BLOCK_R * BLOCK_C])
    b_token = tl.reshape(o_v, [BLOCK_R * BLOCK_C])
    # A logit of −inf is never wanted, and there may be very many.
    m = (b_value >= floor) & (b_value > -float("inf"))
    b_slot = tl.cumsum(m.to(tl.int32), 0) - 1
    i_block = i_n * tl.num_programs(1) + i_b
    m_stored = m & (b_slot < SLOTS)
    tl.store(values_ptr + i_block * SLOTS + b_slot, b_value, mask=m_stored)
    tl.store(tokens_ptr + i_block * SLOTS + b_slot, b_token, mask=m_stored)
    tl.store(counts_ptr + i_block, tl.sum(m.to(tl.int32), 0))


def gather_candidates(logits_SV: Tensor, rows_N: Tensor, top_k_S: Tensor) -> Candidates:
    """Lists of the `top_k_S` largest logits, and perhaps some more, of `rows_N` of `logits_SV`.

    rows_N, top_k_S int64; of these rows 1 ≤ top_k ≤ min(MAX_TOP_K, V).
    """
    num_rows, vocab_size = len(rows_N), logits_SV.shape[1]
    num_columns = min(NUM_COLUMNS, vocab_size)
    num_blocks = triton.cdiv(num_columns, BLOCK_COLUMNS)
    grid = (num_rows, num_blocks)
    block_r = triton.next_power_of_2(triton.cdiv(vocab_size, num_columns))
    table: dict[str, Any] = dict(BLOCK_R=block_r, BLOCK_C=BLOCK_COLUMNS, num_warps=4)

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=logits_SV.device)

    maxima_NC, floor_N = empty(num_columns, torch.float32), empty(1, torch.float32)
    found = Candidates(
        empty(num_blocks * SLOTS, torch.float32),
        empty(num_blocks * SLOTS, torch.int32),
        empty(num_blocks, torch.int32),
    )
    if not num_rows:
        return found
    stride = logits_SV.stride(0)
    _column_maxima_kernel[grid](
        logits_SV, rows_N, maxima_NC, stride, vocab_size, num_columns, **table
    )
    _floor_kernel[(num_rows,)](
        maxima_NC, rows_N, top_k_S, floor_N, num_columns, CHUNK=CHUNK, num_warps=NUM_WARPS
    )
    _gather_kernel[grid](
        logits_SV,
        rows_N,
        maxima_NC,
        floor_N,
        *found,
        stride,
        vocab_size,
        num_columns,
        SLOTS=SLOTS,
        **table,
    )
    return found
