"""Attention of each sequence's last few query tokens over paged keys and values.

    o[t, h] = softmax(scale · q[t, h] · Kᵀ) V       over positions (p(t) − window, p(t)]

A step has `q_len` queries per sequence: one to decode, several to verify a draft. Query t of a
sequence stands at p(t) = seq_len − q_len + t and its key is already in its page. Query heads
h·H/G … share kv head g. A sequence of length 0 is padding: its output is zero.

    q_THC            T = S · q_len, sequence by sequence; C values per key
    k_cache_PBGC     v_cache_PBGK, or None: then V is the first `value_dim` values of the key row
    page_table_SP    int64; a ring when `window` is given (see kv_pages.position_slots)
    seq_lens_S       int64, the queries included
    → o_THK          dtype of q; scores, softmax and sums in float32

The kernel gives a program one split of one sequence's positions and one kv head; its rows are the
q_len × H/G queries of that head, so keys and values are read once for all of them, up to 64:

    positions   0 ... |first   split 0     |        split 1          |   split 2   seq_len
                   [..BLOCK_N|BLOCK_N|BLOCK_N][BLOCK_N|BLOCK_N|BLOCK_N][BLOCK_N|BLOCK_N|..]
    program                (0, g, s)                (1, g, s)               (2, g, s)

A sequence's splits are alike in length. How many there are, decode_combine.py says: that takes only
the sequence's own length, and a second kernel adds them up in order, so that an output doesn't
depend on the batch. The grid holds as many splits as a page table has room for, whatever the
lengths are; programs without positions return at once. A sequence that is a single split is written
without the second kernel's help.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bezel.kernels.cpu.decode_attention import decode_attention_cpu, runs_decode
from bezel.kernels.decode_combine import Splits, combine_splits, live_splits
from bezel.kernels.decode_reference import decode_attention_reference
from bezel.kernels.jit import runs_triton, tile_family, tl, triton

_LOG2_E = 1.4426950408889634


@triton.jit
def _page_ids(
    table_ptr,
    start,
    end,
    PAGE: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pages of a block's positions, as a column; a single id if every block lies in one page."""
    if PAGE % BLOCK_N == 0:
        o_n = start
    else:
        o_n = (start + tl.arange(0, BLOCK_N))[:, None]
    entries = o_n // PAGE
    if RING > 0:
        entries = entries % RING
    return tl.load(table_ptr + entries, mask=o_n < end, other=0)


@triton.jit
def _row_offsets(
    b_page,
    start,
    stride_page,
    PAGE: tl.constexpr,
    TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Offsets of a block's rows, as a column; a token has TOKEN values."""
    o_n = tl.arange(0, BLOCK_N)[:, None]
    if PAGE % BLOCK_N == 0:
        return b_page * stride_page + start % PAGE * TOKEN + o_n * TOKEN
    return b_page * stride_page + (start + o_n) % PAGE * TOKEN


@triton.jit(do_not_specialize=["table_ptr", "seq_lens_ptr", "stride_table"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seq_lens_ptr,
    o_ptr,
    part_o_ptr,
    part_lse_ptr,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_table,
    stride_page,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_LEN: tl.constexpr,
    RING: tl.constexpr,
    PAGE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TURNED: tl.constexpr,
    MIN_LEN: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One split: its part of the output and its log₂-sum-exp, or the output if there is no other.

    `k_ptr` is unused where key rows are packed [V | turned part of K] (TURNED > 0).
    """
    ROWS: tl.constexpr = Q_LEN * GROUP
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    # Row blocks of a split run side by side: the second finds its keys and values in the L2 cache.
    i_split = tl.program_id(0) // ROW_BLOCKS
    i_g = tl.program_id(1)
    i_s = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + i_s).to(tl.int32)
    first, num_live = live_splits(seq_len, MIN_LEN, MAX_COUNT, WINDOW, Q_LEN)
    if i_split >= num_live:
        return

    # Row r of the block: head r % GROUP of query r // GROUP.
    i_m = tl.program_id(0) % ROW_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = i_m < ROWS
    i_t = i_s * Q_LEN + i_m // GROUP
    i_h = i_g * GROUP + i_m % GROUP
    position_m = seq_len - Q_LEN + i_m // GROUP
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < VALUE_DIM
    o_q = i_t.to(tl.int64) * stride_qt + i_h * stride_qh
    # [BLOCK_M, BLOCK_V]
    m_q = m_m[:, None] & m_v[None, :]
    b_q = tl.load(q_ptr + o_q[:, None] + o_v[None, :], mask=m_q, other=0.0)
    if TURNED > 0:
        o_r = tl.arange(0, BLOCK_R)
        m_r = o_r < TURNED
        # [BLOCK_M, BLOCK_R]
        b_qr = tl.load(
            q_ptr + o_q[:, None] + (VALUE_DIM + o_r)[None, :],
            mask=m_m[:, None] & m_r[None, :],
            other=0.0,
        )

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    first_block = first // BLOCK_N
    num_blocks = tl.cdiv(seq_len, BLOCK_N) - first_block
    begin = (first_block + i_split * num_blocks // num_live) * BLOCK_N
    end = (first_block + (i_split + 1) * num_blocks // num_live) * BLOCK_N
    end = tl.minimum(end, seq_len)
    table_ptr += i_s.to(tl.int64) * stride_table
    WIDTH: tl.constexpr = VALUE_DIM + TURNED
    TOKEN: tl.constexpr = NUM_HEADS // GROUP * WIDTH
    k_ptr += i_g * WIDTH
    v_ptr += i_g * WIDTH
    b_page = _page_ids(table_ptr, begin, end, PAGE, RING, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = (o_n >= first) & (o_n < end)
        o_kv = _row_offsets(b_page, start, stride_page, PAGE, TOKEN, BLOCK_N)
        # Page ids come one block ahead: keys that wait for a load of their own block would not be
        # fetched in advance.
        b_page = _page_ids(table_ptr, start + BLOCK_N, end, PAGE, RING, BLOCK_N)
        m_nv = m_n[:, None] & m_v[None, :]
        # [BLOCK_M, BLOCK_V] · [BLOCK_V, BLOCK_N]
        if TURNED > 0:
            b_v = tl.load(v_ptr + o_kv + o_v[None, :], mask=m_nv, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_v), input_precision="ieee")
            b_kr = tl.load(
                v_ptr + o_kv + (VALUE_DIM + o_r)[None, :],
                mask=m_n[:, None] & m_r[None, :],
                other=0.0,
            )
            b_s = tl.dot(b_qr, tl.trans(b_kr), acc=b_s, input_precision="ieee")
        else:
            b_k = tl.load(k_ptr + o_kv + o_v[None, :], mask=m_nv, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_v = tl.load(v_ptr + o_kv + o_v[None, :], mask=m_nv, other=0.0)
        m_mn = m_n[None, :]
        if Q_LEN > 1:
            m_mn = m_mn & (o_n[None, :] <= position_m[:, None])
            if WINDOW > 0:
                m_mn = m_mn & (o_n[None, :] > position_m[:, None] - WINDOW)
        b_s = tl.where(m_mn, b_s * scale_log2, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        # A row may have seen nothing yet: −∞ − −∞ is not a number.
        b_safe_max = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_s - b_safe_max[:, None])
        b_rescale = tl.exp2(b_max - b_safe_max)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        # [BLOCK_M, BLOCK_N] · [BLOCK_N, BLOCK_V]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_o * b_rescale[:, None], input_precision="ieee")
        b_max = b_new_max

    b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    i_row = i_t.to(tl.int64) * NUM_HEADS + i_h
    if num_live == 1:
        o_out = i_row[:, None] * VALUE_DIM + o_v[None, :]
        tl.store(o_ptr + o_out, b_o.to(o_ptr.dtype.element_ty), mask=m_q)
    else:
        i_part = i_split * (tl.num_programs(2) * Q_LEN * NUM_HEADS) + i_row
        tl.store(part_o_ptr + i_part[:, None] * VALUE_DIM + o_v[None, :], b_o, mask=m_q)
        tl.store(part_lse_ptr + i_part, b_max + tl.log2(b_sum), mask=m_m)


class _Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By layout of a key (packed; K and V up to 256 wide; wider K and V), for up to as many rows. The
# float32 sums of 64 × 512 values fill half of a multiprocessor's registers. In 99 KiB of shared
# memory 64 packed queries leave no room for keys, so there they are two blocks of 32.
_TILES: dict[str, dict[str, tuple[_Tile, ...]]] = {
    "sm_80": {
        "packed": (_Tile(16, 32, 8, 2), _Tile(32, 32, 8, 3), _Tile(64, 16, 8, 3)),
        "narrow": (_Tile(16, 32, 4, 3), _Tile(32, 32, 8, 2), _Tile(64, 32, 8, 3)),
        "wide": (_Tile(16, 32, 8, 2), _Tile(32, 32, 8, 2), _Tile(64, 16, 8, 3)),
    },
    "sm_89": {
        "packed": (_Tile(16, 16, 4, 2), _Tile(32, 16, 8, 2)),
        "narrow": (_Tile(16, 32, 4, 2), _Tile(32, 32, 8, 2), _Tile(64, 32, 8, 2)),
        "wide": (_Tile(16, 16, 4, 2), _Tile(32, 16, 8, 2), _Tile(64, 16, 8, 2)),
    },
    "sm_90": {
        "packed": (_Tile(16, 32, 8, 3), _Tile(32, 32, 8, 3), _Tile(64, 32, 8, 3)),
        "narrow": (_Tile(16, 32, 4, 3), _Tile(32, 32, 8, 2), _Tile(64, 32, 8, 3)),
        "wide": (_Tile(16, 32, 8, 2), _Tile(32, 32, 8, 2), _Tile(64, 32, 8, 2)),
    },
    "sm_100": {
        "packed": (_Tile(16, 32, 8, 3), _Tile(32, 32, 8, 3), _Tile(64, 32, 8, 2)),
        "narrow": (_Tile(16, 32, 4, 3), _Tile(32, 32, 8, 2), _Tile(64, 32, 8, 3)),
        "wide": (_Tile(16, 32, 8, 2), _Tile(32, 32, 8, 2), _Tile(64, 32, 8, 2)),
    },
    "gfx942": {
        "packed": (_Tile(16, 16, 4, 2), _Tile(32, 16, 8, 1), _Tile(64, 16, 4, 1)),
        "narrow": (_Tile(16, 32, 4, 2), _Tile(32, 32, 4, 2), _Tile(64, 16, 4, 2)),
        "wide": (_Tile(16, 16, 4, 2), _Tile(32, 16, 4, 1), _Tile(64, 16, 8, 1)),
    },
}
# To be exact, not fast; whatever the width.
_FLOAT32 = dict.fromkeys(_TILES, _Tile(16, 16, 8, 1)) | {"gfx942": _Tile(16, 16, 4, 1)}


def decode_attention(
    q_THC: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    seq_lens_S: Tensor,
    scale: float,
    window: int | None,
    value_dim: int,
    q_len: int = 1,
) -> Tensor:
    """The formula above. Reads no device data on the host, so a CUDA graph can hold it."""
    if not runs_triton(q_THC):
        on_cpu = (
            decode_attention_cpu if runs_decode(q_THC, value_dim) else decode_attention_reference
        )
        return on_cpu(
            q_THC,
            k_cache_PBGC,
            v_cache_PBGK,
            page_table_SP,
            seq_lens_S,
            scale,
            window,
            value_dim,
            q_len,
        )
    num_tokens, num_heads, width = q_THC.shape
    num_seqs, num_entries = page_table_SP.shape
    page_size, num_kv_heads = k_cache_PBGC.shape[1:3]
    group = num_heads // num_kv_heads
    turned = width - value_dim
    assert q_THC.stride(2) == 1 and page_table_SP.stride(1) == 1 and seq_lens_S.is_contiguous()
    assert num_tokens == num_seqs * q_len
    assert k_cache_PBGC.stride()[1:] == (num_kv_heads * width, width, 1)
    if v_cache_PBGK is None:
        assert turned > 0
        v_cache_PBGK = k_cache_PBGC
    else:
        assert turned == 0 and v_cache_PBGK.stride() == k_cache_PBGC.stride()
    o_THK = q_THC.new_empty(num_tokens, num_heads, value_dim)
    if num_tokens == 0:  # a grid must not be empty
        return o_THK
    rows = q_len * group
    tile = _tile(q_THC, value_dim, rows)
    splits = Splits.of(rows, num_kv_heads, value_dim, turned, window, q_len)
    num_splits = splits.most(num_entries * page_size)
    # A single split needs no parts.
    part_shape = (num_splits if num_splits > 1 else 0, num_tokens, num_heads)
    part_o_ITHK = q_THC.new_empty(*part_shape, value_dim, dtype=torch.float32)
    part_lse_ITH = q_THC.new_empty(part_shape, dtype=torch.float32)
    _attend[(num_splits * triton.cdiv(rows, tile.block_m), num_kv_heads, num_seqs)](
        q_THC,
        k_cache_PBGC,
        v_cache_PBGK,
        page_table_SP,
        seq_lens_S,
        o_THK,
        part_o_ITHK,
        part_lse_ITH,
        scale * _LOG2_E,
        q_THC.stride(0),
        q_THC.stride(1),
        page_table_SP.stride(0),
        k_cache_PBGC.stride(0),
        NUM_HEADS=num_heads,
        GROUP=group,
        WINDOW=splits.window,
        Q_LEN=q_len,
        RING=0 if window is None else num_entries,
        PAGE=page_size,
        VALUE_DIM=value_dim,
        TURNED=turned,
        MIN_LEN=splits.min_len,
        MAX_COUNT=splits.max_count,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_R=max(16, triton.next_power_of_2(turned)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        combine_splits(part_o_ITHK, part_lse_ITH, seq_lens_S, o_THK, splits)
    return o_THK


def _tile(q_THC: Tensor, value_dim: int, num_rows: int) -> _Tile:
    width = q_THC.shape[-1]
    if q_THC.element_size() > 2:
        return _FLOAT32[tile_family()]
    layout = "packed" if width > value_dim else "narrow" if width <= 256 else "wide"
    tiles = _TILES[tile_family()][layout]
    return next((tile for tile in tiles if num_rows <= tile.block_m), tiles[-1])
