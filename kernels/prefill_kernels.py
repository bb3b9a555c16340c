"""The Triton kernels behind prefill_attention.py, where formula, shapes and references stand.

One program computes a block of queries of one sequence, for the H/G query heads of one kv head. Its
rows are (token, head) pairs, so that a key is loaded once for all heads that share it:

    grid       (blocks of the longest chunk, G, S); a block beyond its chunk's end leaves at once
    rows       [t0 h0][t0 h1] … [t1 h0][t1 h1] …                    BLOCK_M // (H/G) tokens
    local      begin = first query − window + 1     start                        stop
               [ BLOCK_L ][ BLOCK_L ][ BLOCK_L ][ · ][ BLOCK_L ][ BLOCK_L ][ · ]
               from pages, ring table                from fresh k, v
    global     0                                                                 stop
               [ BLOCK_L ][ BLOCK_L ][ BLOCK_L ][ BLOCK_L ][ BLOCK_L ][ BLOCK_L ]
               from pages; page ids are read one block ahead, so that keys can be as well

`stop` is the end of what the block's queries see: keys are loaded once for each block of queries
that sees one of them, on local layers (b + window − 1) / b times for b tokens a block, on global
ones L / 2b times in a prompt of L tokens. Blocks of one sequence and head stand next to each other
in the grid, so that the L2 cache can serve all of them but the first.

Every block is masked. Only those at the edges need it, but beside products of width 256 and more a
comparison costs nothing, and one loop is easier to read than three.

Scores, softmax and sums are float32; the weights are rounded to V's dtype for the second product.
The order of a row's sums depends on its own sequence and chunk alone.
"""

from typing import NamedTuple

from torch import Tensor

from bezel.kernels.jit import tile_family, tl, triton


class Tile(NamedTuple):
    """BLOCK_M rows × BLOCK_L keys, and how Triton is to compile them."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# The float32 sums of 64 × 512 values fill half of a multiprocessor's registers. 99 KiB of shared
# memory hold 32 × 512 queries and one block of as many keys and values.
_NARROW = {  # key rows of up to 256 values
    "sm_80": Tile(64, 32, 8, 3),
    "sm_89": Tile(64, 32, 8, 2),
    "sm_90": Tile(128, 64, 8, 2),
    "sm_100": Tile(128, 32, 8, 3),
    "gfx942": Tile(64, 32, 4, 1),
}
_WIDE = {  # up to 512 values, V apart
    "sm_80": Tile(32, 32, 8, 2),
    "sm_89": Tile(32, 32, 8, 2),
    "sm_90": Tile(64, 32, 8, 2),
    "sm_100": Tile(64, 32, 8, 2),
    "gfx942": Tile(32, 32, 4, 1),
}
_PACKED = {  # up to 512 values of V and the turned part of K
    "sm_80": Tile(64, 32, 8, 2),
    "sm_89": Tile(32, 32, 8, 2),
    "sm_90": Tile(64, 32, 8, 2),
    "sm_100": Tile(64, 32, 8, 2),
    "gfx942": Tile(32, 32, 4, 1),
}
# To be exact, not fast; whatever the width.
_FLOAT32 = dict.fromkeys(_NARROW, Tile(16, 16, 8, 1)) | {"gfx942": Tile(16, 16, 4, 1)}


def prefill_tile(q_THC: Tensor, is_packed: bool) -> Tile:
    """The blocks in which queries of this width and dtype are computed."""
    width = q_THC.shape[-1]
    if q_THC.element_size() > 2:
        tiles = _FLOAT32
    elif width <= 256:
        tiles = _NARROW
    else:
        tiles = _PACKED if is_packed else _WIDE
    return tiles[tile_family()]


# These begin, and tables are wide, as each step has it: a kernel compiled for one fits all.
_VARYING = ("table_ptr", "cu_seqlens_ptr", "seq_lens_ptr", "last_key_ptr", "stride_table")


@triton.jit
def _page_offsets(
    table_ptr,
    i_l,
    stop,
    stride_page,
    PAGE_SIZE: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_L: tl.constexpr,
    IN_ONE_PAGE: tl.constexpr,
):
    """Where the pages begin that hold positions [i_l, i_l + BLOCK_L): int64, as page ids are."""
    o_l = i_l
    if not IN_ONE_PAGE:
        o_l = i_l + tl.arange(0, BLOCK_L)
    entry = o_l // PAGE_SIZE
    if RING > 0:
        entry %= RING
    return tl.load(table_ptr + entry, mask=o_l < stop, other=0) * stride_page


@triton.jit
def _attend(b_s, m_visible, b_v, scale_log2, b_acc, b_max, b_sum):
    """Online softmax: one more block of scores and values goes into sums relative to a maximum."""
    b_s = tl.where(m_visible, b_s * scale_log2, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    # A row may see nothing of the first blocks; −inf − (−inf) would be NaN.
    b_safe_max = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_shrink = tl.exp2(b_max - b_safe_max)
    b_p = tl.exp2(b_s - b_safe_max[:, None])
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    # [BLOCK_M, BLOCK_L] × [BLOCK_L, BLOCK_K]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_acc * b_shrink[:, None], input_precision="ieee")
    return b_acc, b_new_max, b_sum


@triton.jit(do_not_specialize=_VARYING)
def local_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    last_key_ptr,
    o_ptr,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_page,
    stride_slot,
    stride_table,
    stride_ot,
    scale_log2,
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    i_g = tl.program_id(1)
    i_s = tl.program_id(2).to(tl.int64)
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP
    first_t = tl.program_id(0) * BLOCK_T
    first_row = tl.load(cu_seqlens_ptr + i_s)
    q_len = (tl.load(cu_seqlens_ptr + i_s + 1) - first_row).to(tl.int32)
    if first_t >= q_len:
        return
    start = tl.load(seq_lens_ptr + i_s).to(tl.int32) - q_len

    o_m = tl.arange(0, BLOCK_M)
    o_t = first_t + o_m // GROUP
    m_m = (o_t < q_len) & (o_m < BLOCK_T * GROUP)
    i_h = i_g * GROUP + o_m % GROUP
    b_position = start + o_t
    if last_key_ptr is None:
        b_last = b_position
        stop = start + tl.minimum(first_t + BLOCK_T, q_len)
    else:
        # [BLOCK_M]
        b_last = tl.load(last_key_ptr + first_row + o_t, mask=m_m, other=0).to(tl.int32)
        stop = tl.max(b_last, 0) + 1
    begin = tl.maximum(start + first_t - WINDOW + 1, 0)

    o_k = tl.arange(0, BLOCK_K)
    m_k = (o_k < HEAD_DIM)[None, :]
    o_q = (first_row + o_t) * stride_qt + i_h * HEAD_DIM
    # [BLOCK_M, BLOCK_K]
    b_q = tl.load(q_ptr + o_q[:, None] + o_k[None, :], mask=m_m[:, None] & m_k, other=0.0)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)

    o_tile = tl.arange(0, BLOCK_L)
    table_ptr += i_s * stride_table
    k_cache_ptr += i_g * HEAD_DIM
    v_cache_ptr += i_g * HEAD_DIM
    o_next = _page_offsets(table_ptr, begin, start, stride_page, PAGE_SIZE, RING, BLOCK_L, False)
    for i_l in range(begin, start, BLOCK_L):
        o_l = i_l + o_tile
        o_row = o_next + o_l % PAGE_SIZE * stride_slot
        o_next = _page_offsets(
            table_ptr, i_l + BLOCK_L, start, stride_page, PAGE_SIZE, RING, BLOCK_L, False
        )
        o_kv = o_row[:, None] + o_k[None, :]
        m_kv = (o_l < start)[:, None] & m_k
        # [BLOCK_L, BLOCK_K] each
        b_k = tl.load(k_cache_ptr + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(v_cache_ptr + o_kv, mask=m_kv, other=0.0)
        # [BLOCK_M, BLOCK_K] × [BLOCK_K, BLOCK_L]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        m_visible = (o_l[None, :] > b_position[:, None] - WINDOW) & (o_l < start)[None, :]
        b_acc, b_max, b_sum = _attend(b_s, m_visible, b_v, scale_log2, b_acc, b_max, b_sum)

    k_ptr += (first_row - start) * stride_kt + i_g * HEAD_DIM
    v_ptr += (first_row - start) * stride_vt + i_g * HEAD_DIM
    for i_l in range(tl.maximum(begin, start), stop, BLOCK_L):
        o_l = i_l + o_tile
        o_row = o_l.to(tl.int64)[:, None]
        m_kv = (o_l < stop)[:, None] & m_k
        # [BLOCK_L, BLOCK_K] each
        b_k = tl.load(k_ptr + o_row * stride_kt + o_k[None, :], mask=m_kv, other=0.0)
        b_v = tl.load(v_ptr + o_row * stride_vt + o_k[None, :], mask=m_kv, other=0.0)
        # [BLOCK_M, BLOCK_K] × [BLOCK_K, BLOCK_L]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        m_visible = o_l[None, :] > b_position[:, None] - WINDOW
        m_visible &= o_l[None, :] <= b_last[:, None]
        b_acc, b_max, b_sum = _attend(b_s, m_visible, b_v, scale_log2, b_acc, b_max, b_sum)

    o_o = (first_row + o_t) * stride_ot + i_h * HEAD_DIM
    b_o = (b_acc / b_sum[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + o_o[:, None] + o_k[None, :], b_o, mask=m_m[:, None] & m_k)


@triton.jit(do_not_specialize=_VARYING)
def global_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    o_ptr,
    stride_qt,
    stride_page,
    stride_slot,
    stride_table,
    stride_ot,
    scale_log2,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NUM_TURNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Key rows are [VALUE_DIM | NUM_TURNED]; without `v_cache_ptr` the first part is also V."""
    i_g = tl.program_id(1)
    i_s = tl.program_id(2).to(tl.int64)
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP
    # Programs start in order: the ones with most keys first, the short ones fill the gaps.
    first_t = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    first_row = tl.load(cu_seqlens_ptr + i_s)
    q_len = (tl.load(cu_seqlens_ptr + i_s + 1) - first_row).to(tl.int32)
    if first_t >= q_len:
        return
    start = tl.load(seq_lens_ptr + i_s).to(tl.int32) - q_len
    stop = start + tl.minimum(first_t + BLOCK_T, q_len)

    WIDTH: tl.constexpr = VALUE_DIM + NUM_TURNED
    o_m = tl.arange(0, BLOCK_M)
    o_t = first_t + o_m // GROUP
    m_m = (o_t < q_len) & (o_m < BLOCK_T * GROUP)
    i_h = i_g * GROUP + o_m % GROUP
    o_k = tl.arange(0, BLOCK_K)
    m_k = (o_k < VALUE_DIM)[None, :]
    o_q = (first_row + o_t) * stride_qt + i_h * WIDTH
    # [BLOCK_M, BLOCK_K]
    b_q = tl.load(q_ptr + o_q[:, None] + o_k[None, :], mask=m_m[:, None] & m_k, other=0.0)
    if NUM_TURNED > 0:
        o_j = VALUE_DIM + tl.arange(0, BLOCK_J)
        m_j = (o_j < WIDTH)[None, :]
        # [BLOCK_M, BLOCK_J]
        b_qj = tl.load(q_ptr + o_q[:, None] + o_j[None, :], mask=m_m[:, None] & m_j, other=0.0)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)

    IN_ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_L == 0
    o_tile = tl.arange(0, BLOCK_L)
    table_ptr += i_s * stride_table
    k_cache_ptr += i_g * WIDTH
    if v_cache_ptr is not None:
        v_cache_ptr += i_g * WIDTH
    o_next = _page_offsets(table_ptr, 0, stop, stride_page, PAGE_SIZE, 0, BLOCK_L, IN_ONE_PAGE)
    for i_l in range(0, stop, BLOCK_L):
        o_l = i_l + o_tile
        o_row = (o_next + o_l % PAGE_SIZE * stride_slot)[:, None]
        o_next = _page_offsets(
            table_ptr, i_l + BLOCK_L, stop, stride_page, PAGE_SIZE, 0, BLOCK_L, IN_ONE_PAGE
        )
        m_l = (o_l < stop)[:, None]
        # [BLOCK_L, BLOCK_K]
        b_k = tl.load(k_cache_ptr + o_row + o_k[None, :], mask=m_l & m_k, other=0.0)
        b_v = b_k
        if v_cache_ptr is not None:
            # [BLOCK_L, BLOCK_K]
            b_v = tl.load(v_cache_ptr + o_row + o_k[None, :], mask=m_l & m_k, other=0.0)
        # [BLOCK_M, BLOCK_K] × [BLOCK_K, BLOCK_L]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if NUM_TURNED > 0:
            # [BLOCK_L, BLOCK_J]
            b_kj = tl.load(k_cache_ptr + o_row + o_j[None, :], mask=m_l & m_j, other=0.0)
            # [BLOCK_M, BLOCK_J] × [BLOCK_J, BLOCK_L]
            b_s = tl.dot(b_qj, tl.trans(b_kj), acc=b_s, input_precision="ieee")
        m_visible = o_l[None, :] <= (start + o_t)[:, None]
        b_acc, b_max, b_sum = _attend(b_s, m_visible, b_v, scale_log2, b_acc, b_max, b_sum)

    o_o = (first_row + o_t) * stride_ot + i_h * VALUE_DIM
    b_o = (b_acc / b_sum[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + o_o[:, None] + o_k[None, :], b_o, mask=m_m[:, None] & m_k)
