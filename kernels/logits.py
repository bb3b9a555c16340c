"""What happens to logits between the output head and the draw.

    softcap:        y = cap · tanh(x / cap)
    edit_logits:    x > 0: x /= penalty, else x *= penalty;  x −= subtracted;  x += bias

N rows   V vocabulary   E edits

softcap reads any float dtype, computes in float32 and writes float32; a program takes BLOCK_V
neighbours of one row. Edits are few, so each is a position and three numbers: a program takes
BLOCK_E of them, wherever they lie, and logits without an edit aren't touched.

    positions_E   [ 7 | 9 | V+2 | 3V+0 | … | −1 | −1 ]   in the row-major logits_NV, none twice
    values_3E     penalties; subtracted; biases

E is a multiple of 16, filled up with positions −1 that are no edits: Triton compiles anew for
numbers that aren't, and a step would have to wait.
"""

import torch
from torch import Tensor

from bezel.kernels.cpu import logits as cpu
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.jit import runs_triton, tl, triton

BLOCK_V = 2048
BLOCK_E = 256


def softcap_reference(logits_NV: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits_NV.float() / cap) * cap


def edit_logits_reference(logits_NV: Tensor, positions_E: Tensor, values_3E: Tensor) -> None:
    is_edit_E = positions_E >= 0
    penalty_E, subtracted_E, bias_E = values_3E[:, is_edit_E]
    x_E = logits_NV.view(-1)[positions_E[is_edit_E]]
    x_E = torch.where(x_E > 0, x_E / penalty_E, x_E * penalty_E)
    logits_NV.view(-1)[positions_E[is_edit_E]] = x_E - subtracted_E + bias_E


@triton.jit
def _softcap_kernel(x_ptr, y_ptr, stride_xn, V, cap, BLOCK_V: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    # [BLOCK_V]
    b_x = tl.load(x_ptr + i_n * stride_xn + o_v, mask=m_v, other=0.0).to(tl.float32)
    # tanh(u) = 1 − 2 / (1 + e^2u), which is ±1 where the power is 0 or ∞.
    b_power = tl.exp2(b_x * (2.0 * 1.4426950408889634 / cap))
    tl.store(y_ptr + i_n * V + o_v, cap - 2.0 * cap / (1.0 + b_power), mask=m_v)


@triton.jit
def _edit_logits_kernel(logits_ptr, positions_ptr, values_ptr, E, BLOCK_E: tl.constexpr):
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    # [BLOCK_E] each
    i_e = tl.load(positions_ptr + o_e, mask=o_e < E, other=-1)
    m_e = i_e >= 0
    b_penalty = tl.load(values_ptr + o_e, mask=m_e, other=1.0)
    b_subtracted = tl.load(values_ptr + E + o_e, mask=m_e, other=0.0)
    b_bias = tl.load(values_ptr + 2 * E + o_e, mask=m_e, other=0.0)
    # [BLOCK_E], scattered
    b_x = tl.load(logits_ptr + i_e, mask=m_e, other=0.0)
    b_x = tl.where(b_x > 0, tl.div_rn(b_x, b_penalty), b_x * b_penalty)
    tl.store(logits_ptr + i_e, b_x - b_subtracted + b_bias, mask=m_e)


def softcap(logits_NV: Tensor, cap: float | None) -> Tensor:
    """Float32 logits_NV between −cap and cap; without a cap the same tensor, whatever its dtype."""
    if cap is None:
        return logits_NV
    if runs_numba(logits_NV, logits_NV.shape[-1]):
        return cpu.softcap(logits_NV, cap)
    if not runs_triton(logits_NV):
        return softcap_reference(logits_NV, cap)
    num_rows, vocab_size = logits_NV.shape
    assert logits_NV.stride(1) == 1
    y_NV = torch.empty(logits_NV.shape, dtype=torch.float32, device=logits_NV.device)
    _softcap_kernel[(num_rows, triton.cdiv(vocab_size, BLOCK_V))](
        logits_NV, y_NV, logits_NV.stride(0), vocab_size, cap, BLOCK_V=BLOCK_V, num_warps=4
    )
    return y_NV


def edit_logits(logits_NV: Tensor, positions_E: Tensor, values_3E: Tensor) -> None:
    """Change `logits_NV` (float32, contiguous) in place, at `positions_E` (int64).

    values_3E float32: penalties, what is subtracted, and biases, which may be −inf.
    """
    assert logits_NV.is_contiguous() and logits_NV.dtype == torch.float32
    if not runs_triton(logits_NV):
        edit_logits_reference(logits_NV, positions_E, values_3E)
        return
    num_edits = len(positions_E)
    assert num_edits % 16 == 0 and values_3E.is_contiguous()
    _edit_logits_kernel[(triton.cdiv(num_edits, BLOCK_E),)](
        logits_NV, positions_E, values_3E, num_edits, BLOCK_E=BLOCK_E, num_warps=4
    )
