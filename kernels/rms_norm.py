"""Root-mean-square norm over the last dimension, alone or with the residual sum around it.

    rms(x) = x / sqrt(mean(x²) + eps)
    rms_norm:      y = rms(x) · w
    add_rms_norm:  y = (residual + rms(x) · w) · scalar        z[n] = rms(y) · next_w[n]

T tokens   D model width   N normalised copies of y: what reads y next reads it normalised, so one
pass over memory does the end of one half layer and the beginning of the next.

Activations have any float dtype and results that of x; weights are float32, or None for a norm
without one. Everything is computed in float32. Gemma 3 checkpoints hold w − 1; whoever loads them
adds the one.

One program owns one row, whatever else is in the batch, and holds it in registers:

            D ───────────►┊ BLOCK_D, a power of two
    row t   x x x x x x x ┊ 0 0      Σ x² ─► 1/rms ─► y row t, z rows (0, t) … (N−1, t)
"""

import torch
from torch import Tensor

from bezel.kernels.cpu import norms
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.jit import runs_triton, tl, triton


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Rounded once, to x's dtype."""
    x_float = x.float()
    y = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)


def add_rms_norm_reference(
    x_TD: Tensor,
    weight_D: Tensor | None,
    residual_TD: Tensor,
    eps: float,
    scalar_1: Tensor | None,
    next_weight_ND: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Norm, sum and product are each rounded to x's dtype; z comes from the rounded y."""
    y_TD = residual_TD + rms_norm_reference(x_TD, weight_D, eps)
    if scalar_1 is not None:
        y_TD = (y_TD * scalar_1).to(x_TD.dtype)
    if next_weight_ND is None:
        return y_TD, None
    if len(next_weight_ND) == 1:
        return y_TD, rms_norm_reference(y_TD, next_weight_ND[0], eps)[None]
    return y_TD, torch.stack([rms_norm_reference(y_TD, w_D, eps) for w_D in next_weight_ND])


@triton.jit
def inverse_rms(b_x, D, eps):
    """1 / sqrt(mean(x²) + eps) of one row of D float32 values; x is zero past the D-th.

    Callers load all they need before: the barrier in the sum holds back loads behind it.
    """
    return tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, stride_xt, D, eps, BLOCK_D: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # [BLOCK_D]
    b_x = tl.load(x_ptr + i_t * stride_xt + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = 1.0
    if weight_ptr is not None:
        # [BLOCK_D]
        b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0)
    b_y = b_x * inverse_rms(b_x, D, eps) * b_weight
    tl.store(y_ptr + i_t * D + o_d, b_y, mask=m_d)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    scalar_ptr,
    next_weight_ptr,
    y_ptr,
    z_ptr,
    stride_xt,
    stride_rt,
    stride_wn,
    D,
    eps,
    NUM_NEXT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # [BLOCK_D]
    b_x = tl.load(x_ptr + i_t * stride_xt + o_d, mask=m_d, other=0.0).to(tl.float32)
    # [BLOCK_D]
    b_residual = tl.load(residual_ptr + i_t * stride_rt + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = 1.0
    if weight_ptr is not None:
        # [BLOCK_D]
        b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0)
    b_scalar = 1.0
    if scalar_ptr is not None:
        # one value
        b_scalar = tl.load(scalar_ptr).to(tl.float32)
    b_next_weights = tl.tuple([])
    for i_n in tl.static_range(NUM_NEXT):
        # [BLOCK_D]
        b_next_weights += (tl.load(next_weight_ptr + i_n * stride_wn + o_d, mask=m_d, other=0.0),)
    b_y = (b_residual + b_x * inverse_rms(b_x, D, eps) * b_weight) * b_scalar
    b_y = b_y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + i_t * D + o_d, b_y, mask=m_d)
    if NUM_NEXT > 0:
        # Of y as it was stored, so that a norm of the stored y would come to the same.
        b_stored = b_y.to(tl.float32)
        b_normed = b_stored * inverse_rms(b_stored, D, eps)
        for i_n in tl.static_range(NUM_NEXT):
            o_row = (i_n * tl.num_programs(0) + i_t) * D
            tl.store(z_ptr + o_row + o_d, b_normed * b_next_weights[i_n], mask=m_d)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y in x's shape and dtype. x may have any leading dimensions; its last one is contiguous.

    Leading dimensions without one common stride are copied together first.
    """
    width = x.shape[-1]
    if runs_numba(x, width):
        return norms.rms_norm(x, weight, eps)
    if not runs_triton(x):
        return rms_norm_reference(x, weight, eps)
    x_TD = x.reshape(-1, width)
    assert x_TD.stride(1) == 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm_kernel[(len(x_TD),)](x_TD, weight, y, x_TD.stride(0), width, eps, **row_tile(width))
    return y


def add_rms_norm(
    x_TD: Tensor,
    weight_D: Tensor | None,
    residual_TD: Tensor,
    eps: float,
    scalar_1: Tensor | None,
    next_weight_ND: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(y_TD, z_NTD), both in x's dtype; z is None without `next_weight_ND`.

    Rows of x and residual are contiguous. `scalar_1` is one element of any float dtype, read where
    it lies.
    """
    num_rows, width = x_TD.shape
    if runs_numba(x_TD, width):
        return norms.add_rms_norm(x_TD, weight_D, residual_TD, eps, scalar_1, next_weight_ND)
    if not runs_triton(x_TD):
        return add_rms_norm_reference(x_TD, weight_D, residual_TD, eps, scalar_1, next_weight_ND)
    assert residual_TD.shape == x_TD.shape
    assert x_TD.stride(1) == 1 and residual_TD.stride(1) == 1
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    num_next, stride_wn, z_NTD = 0, 0, None
    if next_weight_ND is not None:
        assert next_weight_ND.stride(1) == 1
        num_next, stride_wn = len(next_weight_ND), next_weight_ND.stride(0)
        z_NTD = torch.empty(num_next, num_rows, width, dtype=x_TD.dtype, device=x_TD.device)
    _add_rms_norm_kernel[(num_rows,)](
        x_TD,
        weight_D,
        residual_TD,
        scalar_1,
        next_weight_ND,
        y_TD,
        z_NTD,
        x_TD.stride(0),
        residual_TD.stride(0),
        stride_wn,
        width,
        eps,
        NUM_NEXT=num_next,
        **row_tile(width),
    )
    return y_TD, z_NTD


def row_tile(width: int) -> dict[str, int]:
    """Launch options for a program that holds a whole row; the same on every architecture.

    From 512 columns on a thread has 8 values or more, whether warps are 32 or 64 wide: 128-bit
    loads of bfloat16.
    """
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(max(block // 512, 1), 8)}
