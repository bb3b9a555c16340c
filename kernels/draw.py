"""The kernels of `sampling`, which says what is drawn.

N rows of one kind, named by `rows_N`   V vocabulary   B blocks of BLOCK_V tokens

draw_uncut: everything above min_p's floor may be drawn. Twice if there is such a floor, since the
largest logit has to be known first:

    [ block 0 | block 1 | … ]  ─► best score and its token of each block  ─► best of the row

draw_cut: a program searches a row's list of candidates, or the row itself. It narrows an interval
of keys down to the last one that top_k keeps, then of those to the last one that top_p keeps:

    rank    0 1 2 3 … ┊ … k−1 ┊ …        mass of the first ranks >= top_p · mass of the first k
                      ╰ top_p ╰ top_k

and ends with one pass for the best score of what is left. Masses are summed in the order of places,
lane by lane and then as a tree, which a row's batch mates have no part in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bezel.kernels.candidates import (
    CHUNK,
    MAX_TOP_K,
    NUM_WARPS,
    SLOTS,
    boundary_key,
    extreme_keys,
    gather_candidates,
    key_value,
    load_candidates,
    load_logits,
    split_at,
)
from bezel.kernels.gumbel import gumbel_tile
from bezel.kernels.jit import tl, triton

BLOCK_V = 2048


class Parameters(NamedTuple):
    """Of each row: temperature, top_p and log of min_p in float32, top_k and noise key in int64."""

    temperature_S: Tensor
    top_p_S: Tensor
    log_min_p_S: Tensor
    top_k_S: Tensor
    key_S: Tensor


@triton.jit
def _best(b_score, b_token, NOTHING: tl.constexpr):
    """The largest score, and the lowest token id that has it."""
    score = tl.max(b_score, 0)
    return score, tl.min(tl.where(b_score == score, b_token, NOTHING), 0)


@triton.jit
def _best_of_block_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    log_min_p_ptr,
    key_ptr,
    peaks_ptr,
    scores_ptr,
    tokens_ptr,
    stride_ls,
    V,
    HAS_NOISE: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    i_n, i_b, num_blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i_s = tl.load(rows_ptr + i_n)
    temperature = tl.load(temperature_ptr + i_s)
    o_v = i_b * BLOCK_V + tl.arange(0, BLOCK_V)
    # [BLOCK_V]
    b_score = load_logits(logits_ptr + i_s * stride_ls + o_v, o_v < V)
    if HAS_NOISE:
        if temperature > 0:
            b_score = tl.div_rn(b_score, temperature)
            if HAS_MIN_P:
                o_b = tl.arange(0, BLOCK_B)
                # [BLOCK_B]
                b_peak = tl.load(
                    peaks_ptr + i_n * num_blocks + o_b, mask=o_b < num_blocks, other=-float("inf")
                )
                floor = tl.div_rn(tl.max(b_peak, 0), temperature) + tl.load(log_min_p_ptr + i_s)
                b_score = tl.where(b_score < floor, -float("inf"), b_score)
            b_score += gumbel_tile(tl.load(key_ptr + i_s), o_v)
    score, token = _best(b_score, o_v, V)
    tl.store(scores_ptr + i_n * num_blocks + i_b, score)
    tl.store(tokens_ptr + i_n * num_blocks + i_b, token)


@triton.jit
def _best_of_row_kernel(
    scores_ptr, tokens_ptr, rows_ptr, out_ptr, num_blocks, V, BLOCK_B: tl.constexpr
):
    i_n = tl.program_id(0).to(tl.int64)
    o_b = tl.arange(0, BLOCK_B)
    # [BLOCK_B]
    b_score = tl.load(
        scores_ptr + i_n * num_blocks + o_b, mask=o_b < num_blocks, other=-float("inf")
    )
    # [BLOCK_B]
    b_token = tl.load(tokens_ptr + i_n * num_blocks + o_b, mask=o_b < num_blocks, other=0)
    _, token = _best(b_score, tl.where(o_b < num_blocks, b_token, V), V)
    tl.store(out_ptr + tl.load(rows_ptr + i_n), token)


@triton.jit
def _draw_cut_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    top_p_ptr,
    log_min_p_ptr,
    top_k_ptr,
    key_ptr,
    values_ptr,
    tokens_ptr,
    counts_ptr,
    out_ptr,
    stride_ls,
    V,
    num_blocks,
    MAX_TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_s = tl.load(rows_ptr + i_n)
    temperature, top_p = tl.load(temperature_ptr + i_s), tl.load(top_p_ptr + i_s)
    top_k, noise_key = tl.load(top_k_ptr + i_s), tl.load(key_ptr + i_s)
    is_list = (top_k > 0) & (top_k <= MAX_TOP_K)
    o_b = tl.arange(0, BLOCK_B)
    # [BLOCK_B]
    b_count = tl.load(
        counts_ptr + i_n * num_blocks + o_b, mask=is_list & (o_b < num_blocks), other=0
    )
    is_list = is_list & (tl.max(b_count, 0) <= SLOTS)
    i_list = i_n * num_blocks * SLOTS
    source = (
        logits_ptr + i_s * stride_ls,
        values_ptr + i_list,
        tokens_ptr + i_list,
        counts_ptr + i_n * num_blocks,
        is_list,
        tl.where(is_list, num_blocks * SLOTS, V),
        SLOTS,
    )
    low, high = extreme_keys(source, CHUNK)
    peak = key_value(high)
    if top_k > 0:
        low = boundary_key(source, low, high, top_k, peak, temperature, False, CHUNK)
    if top_p < 1:
        mass, _, _ = split_at(source, low, peak, temperature, True, CHUNK)
        low = boundary_key(source, low, high, top_p * mass, peak, temperature, True, CHUNK)
    floor = tl.div_rn(peak, temperature) + tl.load(log_min_p_ptr + i_s)
    best_score, best_token = -float("inf"), 0
    for start in range(0, source[5], CHUNK):
        b_value, b_token, b_key = load_candidates(source, start, CHUNK)
        b_score = tl.div_rn(b_value, temperature)
        b_is_kept = (b_key >= low) & (b_score >= floor)
        b_score = b_score + gumbel_tile(noise_key, b_token)
        score, token = _best(tl.where(b_is_kept, b_score, -float("inf")), b_token, V)
        is_better = (score > best_score) | ((score == best_score) & (token < best_token))
        best_score = tl.where(is_better, score, best_score)
        best_token = tl.where(is_better, token, best_token)
    tl.store(out_ptr + i_s, best_token)


def draw_uncut(
    logits_SV: Tensor,
    rows_N: Tensor,
    params: Parameters,
    has_noise: bool,
    has_min_p: bool,
    out_S: Tensor,
) -> None:
    num_rows, vocab_size = len(rows_N), logits_SV.shape[1]
    num_blocks = triton.cdiv(vocab_size, BLOCK_V)
    grid, block_b = (num_rows, num_blocks), triton.next_power_of_2(num_blocks)
    scores_NB = torch.empty(grid, dtype=torch.float32, device=logits_SV.device)
    peaks_NB = torch.empty_like(scores_NB) if has_min_p else scores_NB
    tokens_NB = torch.empty(grid, dtype=torch.int32, device=logits_SV.device)

    def best_of_blocks(scores_NB: Tensor, has_noise: bool) -> None:
        _best_of_block_kernel[grid](
            logits_SV,
            rows_N,
            params.temperature_S,
            params.log_min_p_S,
            params.key_S,
            peaks_NB,
            scores_NB,
            tokens_NB,
            logits_SV.stride(0),
            vocab_size,
            HAS_NOISE=has_noise,
            HAS_MIN_P=has_noise and has_min_p,
            BLOCK_V=BLOCK_V,
            BLOCK_B=block_b,
            num_warps=4,
        )

    if has_min_p:
        best_of_blocks(peaks_NB, has_noise=False)
    best_of_blocks(scores_NB, has_noise)
    _best_of_row_kernel[(num_rows,)](
        scores_NB, tokens_NB, rows_N, out_S, num_blocks, vocab_size, BLOCK_B=block_b, num_warps=1
    )


def draw_cut(
    logits_SV: Tensor, rows_N: Tensor, params: Parameters, num_top_k: int, out_S: Tensor
) -> None:
    """The first `num_top_k` rows are of that kind."""
    found = gather_candidates(logits_SV, rows_N[:num_top_k], params.top_k_S)
    num_blocks = found.counts_NB.shape[1]
    _draw_cut_kernel[(len(rows_N),)](
        logits_SV,
        rows_N,
        *params,
        *found,
        out_S,
        logits_SV.stride(0),
        logits_SV.shape[1],
        num_blocks,
        MAX_TOP_K=MAX_TOP_K,
        SLOTS=SLOTS,
        CHUNK=CHUNK,
        BLOCK_B=triton.next_power_of_2(num_blocks),
        num_warps=NUM_WARPS,
    )
