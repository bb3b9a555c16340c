"""The gated MLPs of the experts that each token chose.

    y[t, j] = down[e] · (gelu_tanh(gate[e] · x[t]) ⊙ (up[e] · x[t]))        e = chosen[t, j]

A dense MLP of n·F hidden units beside the experts is n pseudo-experts more: the i-th has the hidden
units [i·F, (i+1)·F), every token chooses all of them, and their sum is the dense MLP. They read
`x_dense_TD` and follow the chosen experts in y, so X = A + n.

T tokens   D model width   E experts   A experts per token   F expert width   X rows per token
x_TD   chosen_TA ints   gate_up_EFD (gate first, then up)   down_EDF   → y_TXD in x's dtype
Sums are in float32; `hidden` between the two products is in x's dtype.

Two grouped products, in which a tile is BLOCK_M rows of one expert times BLOCK_N columns. The rows
are a block of `moe_dispatch`; up to _MAX_UNSORTED tokens each slot is a block of its own, and each
pseudo-expert is always one block of all tokens:

    row blocks   expert 0 │ expert 0 │ expert 3 │ …          │ dense 0 │ … │ dense n-1
                 x[token of slot]  by sorted_slots            x_dense
    gate_up      BLOCK_N/2 rows of gate and the same rows of up, two sums, one `hidden` tile
    hidden       row r = sorted slot r; after the T·A slots, T rows for each pseudo-expert
    down         hidden rows as they lie  ──▶  y[token, choice]
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.gelu_mul import gelu_mul
from bezel.kernels.jit import runs_triton, tile_family, tl, triton
from bezel.kernels.moe_dispatch import dispatch, max_blocks

MAX_DENSE_TOKENS = 64  # more tokens than this make good use of a dense MLP of its own
_MAX_UNSORTED = 4
_BLOCK_K_BYTES = 128  # the same for all tiles, so that rows are summed in one order
_GROUP_M = 8


class _Tile(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int


# Per BLOCK_M, the same for both products.
_TILES = {
    "sm_80": {16: _Tile(128, 4, 4), 32: _Tile(128, 4, 4), 64: _Tile(128, 8, 4), 128: _Tile(128, 8, 3)},
    "sm_89": {16: _Tile(128, 4, 4), 32: _Tile(128, 4, 4), 64: _Tile(128, 8, 3), 128: _Tile(128, 8, 3)},
    "sm_90": {16: _Tile(128, 4, 5), 32: _Tile(128, 4, 4), 64: _Tile(128, 4, 4), 128: _Tile(256, 8, 3)},
    "sm_100": {16: _Tile(128, 4, 5), 32: _Tile(128, 4, 4), 64: _Tile(128, 4, 4), 128: _Tile(256, 8, 3)},
    "gfx942": {16: _Tile(64, 4, 2), 32: _Tile(128, 4, 2), 64: _Tile(128, 4, 2), 128: _Tile(128, 8, 2)},
}  # fmt: skip


def moe_mlp_reference(
    x_routed_TD: Tensor,
    x_dense_TD: Tensor | None,
    chosen_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    dense_gate_up_FD: Tensor | None,
    dense_down_DF: Tensor | None,
) -> Tensor:
    num_tokens, dim = x_routed_TD.shape
    top_k, width = chosen_TA.shape[1], down_EDF.shape[2]
    num_dense = 0 if dense_down_DF is None else dense_down_DF.shape[1] // width
    y_TXD = x_routed_TD.new_empty(num_tokens, top_k + num_dense, dim)
    # As many rows to a block as there are slots: a block for each expert.
    sorted_slots, blocks = dispatch(chosen_TA, len(down_EDF), chosen_TA.numel())
    for expert, first, end in blocks.tolist():
        if expert >= 0:
            slots = sorted_slots[first:end].long()
            tokens = slots // top_k
            hidden = gelu_mul(F.linear(x_routed_TD[tokens], gate_up_EFD[expert]))
            y_TXD[tokens, slots % top_k] = F.linear(hidden, down_EDF[expert])
    if dense_down_DF is not None and x_dense_TD is not None and dense_gate_up_FD is not None:
        hidden_TF = gelu_mul(F.linear(x_dense_TD, dense_gate_up_FD))
        parts = zip(hidden_TF.split(width, 1), dense_down_DF.split(width, 1), strict=True)
        for i, (part_TF, part_DF) in enumerate(parts):
            y_TXD[:, top_k + i] = F.linear(part_TF, part_DF)
    return y_TXD


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
    SORTED: tl.constexpr,
):
    """(expert, first, end): the rows of `hidden` in row block i_m; expert -1 if there are none."""
    if i_m >= num_routed:
        expert = num_experts + i_m - num_routed
        first = (TOP_K + i_m - num_routed) * num_tokens
        end = first + num_tokens
    elif SORTED:
        expert = tl.load(blocks_ptr + i_m * 3)
        first = tl.load(blocks_ptr + i_m * 3 + 1)
        end = tl.load(blocks_ptr + i_m * 3 + 2)
    else:
        expert = tl.load(chosen_ptr + i_m)
        first = i_m
        end = i_m + 1
    return expert, first, end


@triton.jit
def _slots(sorted_ptr, o_row, m_row, is_routed, SORTED: tl.constexpr):
    """The slots of rows of `hidden`; any number for rows of pseudo-experts."""
    if SORTED:
        return tl.load(sorted_ptr + o_row, mask=m_row & is_routed, other=0)
    return o_row


@triton.jit
def _load(ptrs, m_row, o_k, k_left, EVEN_K: tl.constexpr):
    """A tile of rows with k_left columns to come."""
    if EVEN_K:
        return tl.load(ptrs, mask=m_row[:, None], other=0.0)
    return tl.load(ptrs, mask=m_row[:, None] & (o_k < k_left)[None, :], other=0.0)


@triton.jit
def _gate_up_kernel(
    x_ptr,
    x_dense_ptr,
    weights_ptr,
    dense_weights_ptr,
    hidden_ptr,
    chosen_ptr,
    sorted_ptr,
    blocks_ptr,
    num_tokens,
    num_routed,
    num_dense,
    num_experts,
    dim,
    width,
    stride_xt,
    stride_xdt,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    BLOCK_F: tl.constexpr = BLOCK_N // 2
    i_m, i_n = _tile_indices(num_routed + num_dense, tl.cdiv(width, BLOCK_F), GROUP_M)
    expert, first, end = _row_block(
        i_m, blocks_ptr, chosen_ptr, num_tokens, num_routed, num_experts, TOP_K, SORTED
    )
    if expert < 0:
        return
    is_routed = expert < num_experts
    o_row = first + tl.arange(0, BLOCK_M)
    m_row = o_row < end
    if is_routed:
        x_rows_ptr, stride_x = x_ptr, stride_xt
        gate_ptr = weights_ptr + expert.to(tl.int64) * 2 * width * dim
        num_gate_rows = width
    else:
        x_rows_ptr, stride_x = x_dense_ptr, stride_xdt
        gate_ptr = dense_weights_ptr + (expert - num_experts).to(tl.int64) * width * dim
        num_gate_rows = num_dense * width
    b_slot = _slots(sorted_ptr, o_row, m_row, is_routed, SORTED)
    b_token = tl.where(is_routed, b_slot // TOP_K, tl.arange(0, BLOCK_M))
    o_f = i_n * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < width
    o_k = tl.arange(0, BLOCK_K)
    p_x = x_rows_ptr + b_token.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    p_gate = gate_ptr + o_f.to(tl.int64)[:, None] * dim + o_k[None, :]
    p_up = p_gate + num_gate_rows.to(tl.int64) * dim
    acc_gate = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for k in range(0, dim, BLOCK_K):
        # [BLOCK_M, BLOCK_K] and twice [BLOCK_F, BLOCK_K]
        b_x = _load(p_x + k, m_row, o_k, dim - k, EVEN_K)
        b_gate = _load(p_gate + k, m_f, o_k, dim - k, EVEN_K)
        b_up = _load(p_up + k, m_f, o_k, dim - k, EVEN_K)
        acc_gate = tl.dot(b_x, tl.trans(b_gate), acc_gate, input_precision="ieee")
        acc_up = tl.dot(b_x, tl.trans(b_up), acc_up, input_precision="ieee")
    # gelu_tanh(g) = g · (1 + tanh(u)) / 2 = g · sigmoid(2u)
    b_2u = 1.5957691216057308 * (acc_gate + 0.044715 * acc_gate * acc_gate * acc_gate)
    b_hidden = acc_gate * tl.sigmoid(b_2u) * acc_up
    p_hidden = hidden_ptr + o_row.to(tl.int64)[:, None] * width + o_f[None, :]
    tl.store(p_hidden, b_hidden, mask=m_row[:, None] & m_f[None, :])


@triton.jit
def _down_kernel(
    hidden_ptr,
    weights_ptr,
    dense_weights_ptr,
    y_ptr,
    chosen_ptr,
    sorted_ptr,
    blocks_ptr,
    num_tokens,
    num_routed,
    num_dense,
    num_experts,
    dim,
    width,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = _tile_indices(num_routed + num_dense, tl.cdiv(dim, BLOCK_N), GROUP_M)
    expert, first, end = _row_block(
        i_m, blocks_ptr, chosen_ptr, num_tokens, num_routed, num_experts, TOP_K, SORTED
    )
    if expert < 0:
        return
    is_routed = expert < num_experts
    o_row = first + tl.arange(0, BLOCK_M)
    m_row = o_row < end
    if is_routed:
        columns_ptr = weights_ptr + expert.to(tl.int64) * dim * width
        stride_n = width
    else:
        columns_ptr = dense_weights_ptr + (expert - num_experts) * width
        stride_n = num_dense * width
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < dim
    o_k = tl.arange(0, BLOCK_K)
    p_hidden = hidden_ptr + o_row.to(tl.int64)[:, None] * width + o_k[None, :]
    p_weights = columns_ptr + o_n.to(tl.int64)[:, None] * stride_n + o_k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        # [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]
        b_hidden = _load(p_hidden + k, m_row, o_k, width - k, EVEN_K)
        b_weights = _load(p_weights + k, m_n, o_k, width - k, EVEN_K)
        acc = tl.dot(b_hidden, tl.trans(b_weights), acc, input_precision="ieee")
    b_slot = _slots(sorted_ptr, o_row, m_row, is_routed, SORTED)
    b_token = tl.where(is_routed, b_slot // TOP_K, tl.arange(0, BLOCK_M))
    b_choice = tl.where(is_routed, b_slot % TOP_K, TOP_K + expert - num_experts)
    o_y = b_token.to(tl.int64) * (TOP_K + num_dense) + b_choice
    p_y = y_ptr + o_y[:, None] * dim + o_n[None, :]
    tl.store(p_y, acc, mask=m_row[:, None] & m_n[None, :])


def _block_m(num_tokens: int, top_k: int, num_experts: int, has_dense: bool) -> int:
    """Twice the rows of an average expert, and room for all rows of a pseudo-expert."""
    rows = 2 * num_tokens * top_k // num_experts if num_tokens > _MAX_UNSORTED else 1
    if has_dense:
        rows = max(rows, num_tokens)
    return min(max(triton.next_power_of_2(rows), 16), 128)


def moe_mlp(
    x_routed_TD: Tensor,
    x_dense_TD: Tensor | None,
    chosen_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    dense_gate_up_FD: Tensor | None,
    dense_down_DF: Tensor | None,
) -> Tensor:
    """Unweighted rows y_TXD. The three `dense` tensors are given together or not at all.

    On a GPU they are for at most MAX_DENSE_TOKENS tokens.
    """
    if not runs_triton(x_routed_TD):
        return moe_mlp_reference(
            x_routed_TD,
            x_dense_TD,
            chosen_TA,
            gate_up_EFD,
            down_EDF,
            dense_gate_up_FD,
            dense_down_DF,
        )
    (num_tokens, dim), top_k = x_routed_TD.shape, chosen_TA.shape[1]
    num_experts, _, width = down_EDF.shape
    num_dense = 0
    if dense_down_DF is None or dense_gate_up_FD is None or x_dense_TD is None:
        x_dense_TD, dense_gate_up_FD, dense_down_DF = x_routed_TD, gate_up_EFD, down_EDF
    else:
        num_dense = dense_down_DF.shape[1] // width
        assert num_tokens <= MAX_DENSE_TOKENS and dense_down_DF.shape[1] == num_dense * width
        assert dense_gate_up_FD.is_contiguous() and dense_down_DF.is_contiguous()
    assert gate_up_EFD.is_contiguous() and down_EDF.is_contiguous() and chosen_TA.is_contiguous()
    assert x_routed_TD.stride(1) == x_dense_TD.stride(1) == 1

    block_m = _block_m(num_tokens, top_k, num_experts, num_dense > 0)
    num_routed, is_sorted = num_tokens * top_k, num_tokens > _MAX_UNSORTED
    sorted_slots, blocks = chosen_TA, chosen_TA
    if is_sorted:
        num_routed = max_blocks(num_tokens * top_k, num_experts, block_m)
        sorted_slots, blocks = dispatch(chosen_TA, num_experts, block_m)
    hidden = x_routed_TD.new_empty(num_tokens * (top_k + num_dense), width)
    y_TXD = x_routed_TD.new_empty(num_tokens, top_k + num_dense, dim)

    tile = _TILES[tile_family()][block_m]
    block_k = _BLOCK_K_BYTES // x_routed_TD.element_size()
    places = (chosen_TA, sorted_slots, blocks, num_tokens, num_routed, num_dense, num_experts)
    options = {"TOP_K": top_k, "SORTED": is_sorted, "GROUP_M": _GROUP_M}
    options |= {"BLOCK_M": block_m, "BLOCK_N": tile.block_n, "BLOCK_K": block_k}
    options |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    num_m = num_routed + num_dense
    _gate_up_kernel[(num_m * triton.cdiv(2 * width, tile.block_n),)](
        x_routed_TD,
        x_dense_TD,
        gate_up_EFD,
        dense_gate_up_FD,
        hidden,
        *places,
        dim,
        width,
        x_routed_TD.stride(0),
        x_dense_TD.stride(0),
        EVEN_K=dim % block_k == 0,
        **options,
    )
    _down_kernel[(num_m * triton.cdiv(dim, tile.block_n),)](
        hidden,
        down_EDF,
        dense_down_DF,
        y_TXD,
        *places,
        dim,
        width,
        EVEN_K=width % block_k == 0,
        **options,
    )
    return y_TXD
