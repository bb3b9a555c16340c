"""Log-probabilities of drawn tokens, and the likeliest tokens beside them.

    logprob(i) = x[i] − ln Σⱼ e^x[j]

N rows   V vocabulary   M likeliest tokens asked for   B blocks of BLOCK_V tokens

Of the logits as they come from the model, or as penalties and biases left them, whichever are
given; temperature and cuts don't enter. logits_NV any float dtype, all sums in float32.

    logits of a row  [ block 0 | block 1 | … ]   ─► maximum and Σ e^(x − maximum) of each block
                                                 ─► list of candidates, see there
    one program a row: joins the sums in the order of the blocks, looks M times for the next in rank
"""

import torch
from torch import Tensor

from bezel.kernels.candidates import (
    CHUNK,
    MAX_TOP_K,
    NUM_WARPS,
    SLOTS,
    gather_candidates,
    key_token,
    key_value,
    largest,
    load_candidates,
    load_logits,
)
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.cpu.logprobs import logprobs as cpu_logprobs
from bezel.kernels.jit import runs_triton, tl, triton

BLOCK_V = 2048


def logprobs_reference(
    logits_NV: Tensor, token_ids_N: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_NV = logits_NV.float().log_softmax(-1)
    _, top_ids_NM = largest(logits_NV.float(), num_top)
    chosen_N = logprobs_NV.gather(1, token_ids_N[:, None])[:, 0]
    return chosen_N, logprobs_NV.gather(1, top_ids_NM), top_ids_NM


@triton.jit
def _block_sums_kernel(logits_ptr, maxima_ptr, sums_ptr, stride_ln, V, BLOCK_V: tl.constexpr):
    i_n, i_b, num_blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_v = i_b * BLOCK_V + tl.arange(0, BLOCK_V)
    # [BLOCK_V]
    b_value = load_logits(logits_ptr + i_n * stride_ln + o_v, o_v < V)
    maximum = tl.max(b_value, 0)
    safe = tl.where(maximum == -float("inf"), 0.0, maximum)
    tl.store(maxima_ptr + i_n * num_blocks + i_b, maximum)
    tl.store(sums_ptr + i_n * num_blocks + i_b, tl.sum(tl.exp(b_value - safe), 0))


@triton.jit(do_not_specialize=["num_top"])
def _logprobs_kernel(
    logits_ptr,
    token_ids_ptr,
    maxima_ptr,
    sums_ptr,
    values_ptr,
    tokens_ptr,
    counts_ptr,
    chosen_ptr,
    top_values_ptr,
    top_ids_ptr,
    stride_ln,
    V,
    num_blocks,
    num_list_blocks,
    num_top,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + i_n * stride_ln
    o_b, o_l = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_L)
    m_b = o_b < num_blocks
    # [BLOCK_B] each
    b_maximum = tl.load(maxima_ptr + i_n * num_blocks + o_b, mask=m_b, other=-float("inf"))
    b_sum = tl.load(sums_ptr + i_n * num_blocks + o_b, mask=m_b, other=0.0)
    maximum = tl.max(b_maximum, 0)
    safe = tl.where(maximum == -float("inf"), 0.0, maximum)
    log_sum = safe + tl.log(tl.sum(b_sum * tl.exp(b_maximum - safe), 0))
    value = tl.load(row_ptr + tl.load(token_ids_ptr + i_n)).to(tl.float32)
    tl.store(chosen_ptr + i_n, value - log_sum)
    # [BLOCK_L]
    b_count = tl.load(
        counts_ptr + i_n * num_list_blocks + o_l,
        mask=(num_top > 0) & (o_l < num_list_blocks),
        other=0,
    )
    is_list = (tl.max(b_count, 0) <= SLOTS) & (tl.sum(b_count, 0) >= num_top)
    i_list = i_n * num_list_blocks * SLOTS
    source = (
        row_ptr,
        values_ptr + i_list,
        tokens_ptr + i_list,
        counts_ptr + i_n * num_list_blocks,
        is_list,
        tl.where(is_list, num_list_blocks * SLOTS, V),
        SLOTS,
    )
    last_key = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for i_m in range(0, num_top):
        b_next = tl.full([CHUNK], -1, tl.int64)
        for start in range(0, source[5], CHUNK):
            _, _, b_key = load_candidates(source, start, CHUNK)
            b_next = tl.maximum(b_next, tl.where(b_key < last_key, b_key, -1))
        last_key = tl.max(b_next, 0)
        tl.store(top_values_ptr + i_n * num_top + i_m, key_value(last_key) - log_sum)
        tl.store(top_ids_ptr + i_n * num_top + i_m, key_token(last_key))


def logprobs(logits_NV: Tensor, token_ids_N: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs_N of the tokens, logprobs_NM and token ids_NM of the likeliest in rank order).

    Logprobs float32, ids int64; 0 ≤ num_top ≤ min(MAX_TOP_K, V), and meant to be 20 or less.
    """
    num_rows, vocab_size = logits_NV.shape
    assert 0 <= num_top <= min(MAX_TOP_K, vocab_size) and logits_NV.stride(1) == 1
    if runs_numba(logits_NV, vocab_size):
        return cpu_logprobs(logits_NV, token_ids_N, num_top)
    if not runs_triton(logits_NV):
        return logprobs_reference(logits_NV, token_ids_N, num_top)
    device, num_blocks = logits_NV.device, triton.cdiv(vocab_size, BLOCK_V)
    maxima_NB = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=device)
    sums_NB = torch.empty_like(maxima_NB)
    _block_sums_kernel[(num_rows, num_blocks)](
        logits_NV,
        maxima_NB,
        sums_NB,
        logits_NV.stride(0),
        vocab_size,
        BLOCK_V=BLOCK_V,
        num_warps=4,
    )
    rows = torch.arange(num_rows if num_top else 0, device=device)
    found = gather_candidates(logits_NV, rows, torch.full((num_rows,), num_top, device=device))
    num_list_blocks = found.counts_NB.shape[1]
    chosen_N = torch.empty(num_rows, dtype=torch.float32, device=device)
    top_values_NM = torch.empty(num_rows, num_top, dtype=torch.float32, device=device)
    top_ids_NM = torch.empty(num_rows, num_top, dtype=torch.int64, device=device)
    _logprobs_kernel[(num_rows,)](
        logits_NV,
        token_ids_N,
        maxima_NB,
        sums_NB,
        *found,
        chosen_N,
        top_values_NM,
        top_ids_NM,
        logits_NV.stride(0),
        vocab_size,
        num_blocks,
        num_list_blocks,
        num_top,
        SLOTS=SLOTS,
        CHUNK=CHUNK,
        BLOCK_B=triton.next_power_of_2(num_blocks),
        BLOCK_L=triton.next_power_of_2(num_list_blocks),
        num_warps=NUM_WARPS,
    )
    return chosen_N, top_values_NM, top_ids_NM
