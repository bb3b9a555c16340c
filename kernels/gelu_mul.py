"""GELU times a factor: the gate of Gemma's MLPs and of its per-layer embeddings.

    gelu_tanh(x) = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
    gelu_mul:      y = gelu_tanh(gate) · up           gate_up_TF2 holds both, gate first
    gelu_times:    y = gelu_tanh(gate) · factor

T tokens   F feed-forward width   E width of gate, factor and y alike

All tensors have one float dtype; the kernel computes in float32 and rounds once. A program takes
BLOCK_E neighbours of one row:

    token t   gate    [ program (t, 0) | program (t, 1) | … ┊ masked ]
              factor  [ the same columns                    ┊        ]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.cpu import gelu
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.jit import runs_triton, tl, triton


def gelu_times_reference(gate_TE: Tensor, factor_TE: Tensor) -> Tensor:
    """GELU and product are each rounded to the tensors' dtype."""
    return F.gelu(gate_TE, approximate="tanh") * factor_TE


@triton.jit
def gelu_tanh(b_x):
    """GELU of float32 values, finite for every finite one.

    (1 + tanh(u)) / 2 = 1 / (1 + e^−2u). Where the power overflows, x / ∞ is the zero it should be;
    u is x times a sum of positive terms, so an overflow of x² never meets one of the other sign.
    """
    b_2u = b_x * (2.0 * 0.7978845608028654) * (1.0 + 0.044715 * b_x * b_x)
    return b_x / (1.0 + tl.exp2(-1.4426950408889634 * b_2u))


@triton.jit
def _gelu_times_kernel(gate_ptr, factor_ptr, y_ptr, stride_gt, stride_ft, E, BLOCK_E: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < E
    # [BLOCK_E]
    b_gate = tl.load(gate_ptr + i_t * stride_gt + o_e, mask=m_e, other=0.0).to(tl.float32)
    # [BLOCK_E]
    b_factor = tl.load(factor_ptr + i_t * stride_ft + o_e, mask=m_e, other=0.0).to(tl.float32)
    tl.store(y_ptr + i_t * E + o_e, gelu_tanh(b_gate) * b_factor, mask=m_e)


def gelu_mul(gate_up_TF2: Tensor) -> Tensor:
    """y_TF in gate_up's dtype, half as wide."""
    if runs_numba(gate_up_TF2, gate_up_TF2.shape[-1] // 2):
        return gelu.gelu_mul(gate_up_TF2)
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return gelu_times(gate_TF, up_TF)


def gelu_times(gate_TE: Tensor, factor_TE: Tensor) -> Tensor:
    """y_TE in gate's dtype. Rows of gate and factor are contiguous, at any stride."""
    num_rows, width = gate_TE.shape
    if runs_numba(gate_TE, width):
        return gelu.gelu_times(gate_TE, factor_TE)
    if not runs_triton(gate_TE):
        return gelu_times_reference(gate_TE, factor_TE)
    assert factor_TE.shape == gate_TE.shape
    assert gate_TE.stride(1) == 1 and factor_TE.stride(1) == 1
    y_TE = torch.empty(gate_TE.shape, dtype=gate_TE.dtype, device=gate_TE.device)
    # From 512 columns on a thread has 8 values or more, whether warps are 32 or 64 wide: 128-bit
    # loads of bfloat16.
    block = min(triton.next_power_of_2(width), 1024)
    _gelu_times_kernel[(num_rows, triton.cdiv(width, block))](
        gate_TE,
        factor_TE,
        y_TE,
        gate_TE.stride(0),
        factor_TE.stride(0),
        width,
        BLOCK_E=block,
        num_warps=max(block // 512, 1),
    )
    return y_TE
