"""Tokens that a grammar forbids get the logit −∞.

    y = x + (0 if the token's bit is set else −∞)

N rows   V vocabulary   M masks, each for one of the rows   W words of 32 tokens, ⌈V / 32⌉

logits_NV float32, mask_MW int32: bit i of word w is token 32·w + i. Rows without a mask aren't
touched, nor is anything for a mask of row −1, which is padding.

    mask_MW  one word    [ 0 1 0 0 … 1 ]
    logits_NV            [ ↓ · ↓ ↓ … · ]    ↓ −∞ is stored   · left as it is

A program takes BLOCK_W words of one mask. It reads no logits, and writes what is forbidden only.
"""

import torch
from torch import Tensor

from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.cpu.token_mask import apply_token_mask as cpu_apply_token_mask
from bezel.kernels.jit import runs_triton, tl, triton

BLOCK_W = 64


def apply_token_mask_reference(logits_NV: Tensor, rows_M: Tensor, mask_MW: Tensor) -> None:
    # What to add for each of the 256 values of a byte: a look-up is ten times faster than shifts.
    is_set = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    added = torch.where(is_set == 1, 0.0, -torch.inf)
    for row, mask_W in zip(rows_M.tolist(), mask_MW, strict=True):
        if row >= 0:
            added_V = added.index_select(0, mask_W.view(torch.uint8).int()).view(-1)
            logits_NV[row] += added_V[: logits_NV.shape[1]]


@triton.jit
def _token_mask_kernel(
    logits_ptr, rows_ptr, mask_ptr, stride_logits_n, stride_mask_m, V, W, BLOCK_W: tl.constexpr
):
    i_m = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    i_n = tl.load(rows_ptr + i_m)
    m_w = (o_w < W) & (i_n >= 0)
    # [BLOCK_W]; all ones: nothing is forbidden
    b_word = tl.load(mask_ptr + i_m * stride_mask_m + o_w, mask=m_w, other=-1)
    o_bit = tl.arange(0, 32)
    # [BLOCK_W, 32]
    o_v = o_w[:, None] * 32 + o_bit[None, :]
    m_forbidden = ((b_word[:, None] >> o_bit[None, :]) & 1) == 0
    b_infinite = tl.full([BLOCK_W, 32], float("-inf"), tl.float32)
    tl.store(logits_ptr + i_n * stride_logits_n + o_v, b_infinite, mask=m_forbidden & (o_v < V))


def apply_token_mask(logits_NV: Tensor, rows_M: Tensor, mask_MW: Tensor) -> None:
    """Set the forbidden logits of the rows `rows_M` (int64) in `logits_NV` (float32) to −∞.

    mask_MW int32, for each of `rows_M`, of which none but −1 comes twice. A forbidden logit that
    is NaN or +∞, the model's fault, may become NaN.
    """
    num_masks, num_words = mask_MW.shape
    vocab_size = logits_NV.shape[1]
    assert logits_NV.dtype == torch.float32 and logits_NV.stride(1) == 1
    assert num_words * 32 >= vocab_size and mask_MW.stride(1) == 1
    if runs_numba(logits_NV, vocab_size):
        cpu_apply_token_mask(logits_NV, rows_M, mask_MW)
        return
    if not runs_triton(logits_NV):
        apply_token_mask_reference(logits_NV, rows_M, mask_MW)
        return
    _token_mask_kernel[(num_masks, triton.cdiv(num_words, BLOCK_W))](
        logits_NV,
        rows_M,
        mask_MW,
        logits_NV.stride(0),
        mask_MW.stride(0),
        vocab_size,
        num_words,
        BLOCK_W=BLOCK_W,
        num_warps=4,
    )
