"""The two grouped products of the experts' gated MLPs, and the tiles they are cut into.

    gate_up   hidden[r] = gelu_tanh(gate[e] · x[t]) ⊙ (up[e] · x[t])
    down      y[t, j] = down[e] · hidden[r]

A tile is BLOCK_M rows r of one expert e times BLOCK_N columns. Row blocks of routed slots come from
`moe_dispatch`; without it (few tokens) each slot is a block of its own. Then there is one block of
all tokens for each pseudo-expert, which is a part of the dense MLP with weights of its own:

    row blocks   expert 0 │ expert 0 │ expert 3 │ … │ unused   │ dense 0 │ … │ dense n-1
    rows r       sorted slots 0 … T·A-1, then T rows for each pseudo-expert
    gate_up      x[token of slot] or x_dense, times BLOCK_N/2 rows of gate and the same rows of up
    down         rows of hidden as they lie, written to y[token, choice]

T tokens   D model width   E experts   A experts per token   F expert width   X = A + n rows per
token. x, weights, hidden_RF and y_TXD in one dtype; sums are in float32, GELU and product too.
Rows past a block's end are neither read nor written, weights of experts without rows are not read.
"""

from typing import NamedTuple

from bezel.kernels.gelu_mul import gelu_tanh
from bezel.kernels.jit import tile_family, tl, triton

_BLOCK_K_BYTES = 128  # the same for all tiles, so that rows are summed in one order
_GROUP_M = 8


class _Tile(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int


# By BLOCK_M, for both products. 64 columns of gate and of up divide 704, Gemma 4's expert width.
_TILES = {
    "sm_80": {
        16: _Tile(128, 4, 4),
        32: _Tile(128, 4, 4),
        64: _Tile(128, 8, 4),
        128: _Tile(128, 8, 3),
    },
    "sm_89": {
        16: _Tile(128, 4, 3),
        32: _Tile(128, 4, 3),
        64: _Tile(128, 8, 3),
        128: _Tile(128, 8, 3),
    },
    "sm_90": {
        16: _Tile(128, 4, 5),
        32: _Tile(128, 4, 4),
        64: _Tile(128, 4, 4),
        128: _Tile(256, 8, 3),
    },
    "sm_100": {
        16: _Tile(128, 4, 5),
        32: _Tile(128, 4, 4),
        64: _Tile(128, 4, 4),
        128: _Tile(256, 8, 3),
    },
    "gfx942": {
        16: _Tile(64, 4, 2),
        32: _Tile(128, 4, 2),
        64: _Tile(128, 4, 2),
        128: _Tile(128, 8, 2),
    },
}
_FLOAT32 = _Tile(64, 8, 2)  # to be exact, not fast; whatever the rows and architecture


def tile_options(block_m: int, element_size: int) -> dict[str, int]:
    """Launch options of both kernels for blocks of 16, 32, 64 or 128 rows."""
    tile = _FLOAT32 if element_size > 2 else _TILES[tile_family()][block_m]
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": _BLOCK_K_BYTES // element_size,
        "GROUP_M": _GROUP_M,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit
def _tile_indices(num_m, num_n, GROUP_M: tl.constexpr):
    """Row block and column block of this program.

    Neighbours have GROUP_M row blocks, mostly of one expert, and the same columns of weights, so
    that both are found in the L2 cache when they are read again.
    """
    i = tl.program_id(0)
    i_group = i // (GROUP_M * num_n)
    i_in_group = i % (GROUP_M * num_n)
    size = tl.minimum(num_m - i_group * GROUP_M, GROUP_M)
    return i_group * GROUP_M + i_in_group % size, i_in_group // size


@triton.jit
def _row_block(
    i_m,
    blocks_ptr,
    chosen_ptr,
    num_tokens,
    num_routed,
    num_experts,
    TOP_K: tl.constexpr,
):
    """(expert, first, end): the rows of `hidden` in row block i_m; expert -1 if there are none."""
    if i_m >= num_routed:
        expert = num_experts + i_m - num_routed
        first = (TOP_K + i_m - num_routed) * num_tokens
        end = first + num_tokens
    elif blocks_ptr is None:
        expert = tl.load(chosen_ptr + i_m)
        first = i_m
        end = i_m + 1
    else:
        expert = tl.load(blocks_ptr + i_m * 3)
        first = tl.load(blocks_ptr + i_m * 3 + 1)
        end = tl.load(blocks_ptr + i_m * 3 + 2)
    return expert, first, end


@triton.jit
def _tokens_and_choices(
    sorted_slots_ptr, o_row, m_row, dense, BLOCK_M: tl.constexpr, TOP_K: tl.constexpr
):
    """Where rows of `hidden` come from and where they go in y; `dense` < 0 for a routed expert."""
    if dense >= 0:
        b_token = tl.arange(0, BLOCK_M)
        b_choice = tl.full([BLOCK_M], TOP_K, tl.int32) + dense
    else:
        b_slot = o_row
        if sorted_slots_ptr is not None:
            b_slot = tl.load(sorted_slots_ptr + o_row, mask=m_row, other=0)
        b_token = b_slot // TOP_K
        b_choice = b_slot % TOP_K
    return b_token, b_choice


@triton.jit
def _load(ptrs, m_row, o_k, k_left, EVEN_K: tl.constexpr):
    """A tile of rows with k_left columns to come."""
    if EVEN_K:
        return tl.load(ptrs, mask=m_row[:, None], other=0.0)
    return tl.load(ptrs, mask=m_row[:, None] & (o_k < k_left)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_routed", "num_dense"])
def gate_up_kernel(
    x_ptr,
    x_dense_ptr,
    weights_ptr,
    dense_weights_ptr,
    hidden_ptr,
    chosen_ptr,
    sorted_slots_ptr,
    blocks_ptr,
    num_tokens,
    num_routed,
    num_dense,
    num_experts,
    D,
    F,
    stride_xt,
    stride_xdt,
    TOP_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    BLOCK_F: tl.constexpr = BLOCK_N // 2
    i_m, i_n = _tile_indices(num_routed + num_dense, tl.cdiv(F, BLOCK_F), GROUP_M)
    expert, first, end = _row_block(
        i_m, blocks_ptr, chosen_ptr, num_tokens, num_routed, num_experts, TOP_K
    )
    if expert < 0:
        return
    dense = expert - num_experts
    o_row = first + tl.arange(0, BLOCK_M)
    m_row = o_row < end
    b_token, _ = _tokens_and_choices(sorted_slots_ptr, o_row, m_row, dense, BLOCK_M, TOP_K)
    if dense >= 0:
        rows_ptr, stride_t = x_dense_ptr, stride_xdt
        gate_ptr = dense_weights_ptr + dense.to(tl.int64) * F * D
        num_gate_rows = num_dense * F
    else:
        rows_ptr, stride_t = x_ptr, stride_xt
        gate_ptr = weights_ptr + expert.to(tl.int64) * 2 * F * D
        num_gate_rows = F
    o_f = i_n * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    o_k = tl.arange(0, BLOCK_K)
    p_x = rows_ptr + b_token.to(tl.int64)[:, None] * stride_t + o_k[None, :]
    p_gate = gate_ptr + o_f.to(tl.int64)[:, None] * D + o_k[None, :]
    p_up = p_gate + num_gate_rows.to(tl.int64) * D
    acc_gate = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for k in range(0, D, BLOCK_K):
        # [BLOCK_M, BLOCK_K] and twice [BLOCK_F, BLOCK_K]
        b_x = _load(p_x + k, m_row, o_k, D - k, EVEN_K)
        b_gate = _load(p_gate + k, m_f, o_k, D - k, EVEN_K)
        b_up = _load(p_up + k, m_f, o_k, D - k, EVEN_K)
        acc_gate = tl.dot(b_x, tl.trans(b_gate), acc_gate, input_precision="ieee")
        acc_up = tl.dot(b_x, tl.trans(b_up), acc_up, input_precision="ieee")
    p_hidden = hidden_ptr + o_row.to(tl.int64)[:, None] * F + o_f[None, :]
    tl.store(p_hidden, gelu_tanh(acc_gate) * acc_up, mask=m_row[:, None] & m_f[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_routed", "num_dense"])
def down_kernel(
    hidden_ptr,
    weights_ptr,
    dense_weights_ptr,
    y_ptr,
    chosen_ptr,
    sorted_slots_ptr,
    blocks_ptr,
    num_tokens,
    num_routed,
    num_dense,
    num_experts,
    D,
    F,
    TOP_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = _tile_indices(num_routed + num_dense, tl.cdiv(D, BLOCK_N), GROUP_M)
    expert, first, end = _row_block(
        i_m, blocks_ptr, chosen_ptr, num_tokens, num_routed, num_experts, TOP_K
    )
    if expert < 0:
        return
    dense = expert - num_experts
    o_row = first + tl.arange(0, BLOCK_M)
    m_row = o_row < end
    if dense >= 0:
        down_ptr, stride_d = dense_weights_ptr + dense * F, num_dense * F
    else:
        down_ptr, stride_d = weights_ptr + expert.to(tl.int64) * D * F, F
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < D
    o_k = tl.arange(0, BLOCK_K)
    p_hidden = hidden_ptr + o_row.to(tl.int64)[:, None] * F + o_k[None, :]
    p_weights = down_ptr + o_n.to(tl.int64)[:, None] * stride_d + o_k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, F, BLOCK_K):
        # [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]
        b_hidden = _load(p_hidden + k, m_row, o_k, F - k, EVEN_K)
        b_weights = _load(p_weights + k, m_n, o_k, F - k, EVEN_K)
        acc = tl.dot(b_hidden, tl.trans(b_weights), acc, input_precision="ieee")
    b_token, b_choice = _tokens_and_choices(sorted_slots_ptr, o_row, m_row, dense, BLOCK_M, TOP_K)
    o_y = b_token.to(tl.int64) * (TOP_K + num_dense) + b_choice
    p_y = y_ptr + o_y[:, None] * D + o_n[None, :]
    tl.store(p_y, acc, mask=m_row[:, None] & m_n[None, :])
