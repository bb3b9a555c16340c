"""Joins the experts' rows with the dense MLP and adds them to the residual.

    routed = Σ_j w[j] · y[j]  over the A experts;   dense = Σ_i y[A + i], or given
    mixed  = rms(dense) · dense_norm + rms(routed) · routed_norm
    out    = (residual + rms(mixed) · post_norm) · scalar;   next = rms(out) · next_weight
    rms(x) = x / sqrt(mean(x²) + eps)

T tokens   D model width   A experts per token   X = A + n rows per token, n of them dense
y_TXD, dense_TD, residual_TD in one dtype; weights_TA and the norms' weights float32; scalar_1 any
→ out_TD, next_TD in the residual's dtype. The kernel computes in float32 and rounds at the two
stores, `next` coming from the rounded `out`; the reference rounds each step, as torch modules do.

One program owns one token and holds its whole row, BLOCK_D values, in registers:

    y[t, 0] … y[t, A-1] ──▶ routed ─┐
    y[t, A] … y[t, X-1] ──▶ dense ──┴▶ mixed ─▶ out row t ─▶ next row t
"""

from torch import Tensor

from bezel.kernels.cpu import combine
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.jit import runs_triton, tl, triton
from bezel.kernels.rms_norm import (
    add_rms_norm_reference,
    inverse_rms,
    rms_norm_reference,
    row_tile,
)


def combine_experts_reference(
    y_TXD: Tensor,
    weights_TA: Tensor,
    dense_TD: Tensor | None,
    routed_norm_D: Tensor,
    dense_norm_D: Tensor,
    post_norm_D: Tensor,
    residual_TD: Tensor,
    eps: float,
    scalar_1: Tensor | None,
    next_weight_D: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    top_k, dtype = weights_TA.shape[1], residual_TD.dtype
    routed_TD = y_TXD[:, 0].float() * weights_TA[:, :1]
    for j in range(1, top_k):
        routed_TD = routed_TD.addcmul(y_TXD[:, j].float(), weights_TA[:, j : j + 1])
    if dense_TD is None:
        dense_TD = y_TXD[:, top_k:].float().sum(1).to(dtype)
    mixed_TD = rms_norm_reference(dense_TD, dense_norm_D, eps)
    mixed_TD = mixed_TD + rms_norm_reference(routed_TD.to(dtype), routed_norm_D, eps)
    next_weight_1D = None if next_weight_D is None else next_weight_D[None]
    out_TD, next_1TD = add_rms_norm_reference(
        mixed_TD, post_norm_D, residual_TD, eps, scalar_1, next_weight_1D
    )
    return out_TD, None if next_1TD is None else next_1TD[0]


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    dense_ptr,
    routed_norm_ptr,
    dense_norm_ptr,
    post_norm_ptr,
    residual_ptr,
    scalar_ptr,
    next_weight_ptr,
    out_ptr,
    next_ptr,
    stride_dt,
    stride_rt,
    D,
    eps,
    TOP_K: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_y = y_ptr + i_t * NUM_ROWS * D + o_d
    b_routed = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(TOP_K):
        weight = tl.load(weights_ptr + i_t * TOP_K + j)
        # [BLOCK_D]
        b_routed += weight * tl.load(p_y + j * D, mask=m_d, other=0.0).to(tl.float32)
    b_dense = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(TOP_K, NUM_ROWS):
        # [BLOCK_D]
        b_dense += tl.load(p_y + j * D, mask=m_d, other=0.0).to(tl.float32)
    if dense_ptr is not None:
        # [BLOCK_D]
        b_dense = tl.load(dense_ptr + i_t * stride_dt + o_d, mask=m_d, other=0.0).to(tl.float32)
    # five times [BLOCK_D]
    b_residual = tl.load(residual_ptr + i_t * stride_rt + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_routed_norm = tl.load(routed_norm_ptr + o_d, mask=m_d, other=0.0)
    b_dense_norm = tl.load(dense_norm_ptr + o_d, mask=m_d, other=0.0)
    b_post_norm = tl.load(post_norm_ptr + o_d, mask=m_d, other=0.0)
    if next_weight_ptr is not None:
        b_next_weight = tl.load(next_weight_ptr + o_d, mask=m_d, other=0.0)
    scalar = 1.0
    if scalar_ptr is not None:
        scalar = tl.load(scalar_ptr).to(tl.float32)
    b_mixed = b_dense * inverse_rms(b_dense, D, eps) * b_dense_norm
    b_mixed += b_routed * inverse_rms(b_routed, D, eps) * b_routed_norm
    b_out = (b_residual + b_mixed * inverse_rms(b_mixed, D, eps) * b_post_norm) * scalar
    b_out = b_out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i_t * D + o_d, b_out, mask=m_d)
    if next_weight_ptr is not None:
        b_stored = b_out.to(tl.float32)
        b_next = b_stored * inverse_rms(b_stored, D, eps) * b_next_weight
        tl.store(next_ptr + i_t * D + o_d, b_next, mask=m_d)


def combine_experts(
    y_TXD: Tensor,
    weights_TA: Tensor,
    dense_TD: Tensor | None,
    routed_norm_D: Tensor,
    dense_norm_D: Tensor,
    post_norm_D: Tensor,
    residual_TD: Tensor,
    eps: float,
    scalar_1: Tensor | None,
    next_weight_D: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`out_TD` and `next_TD`, no `next_TD` without `next_weight_D`.

    `dense_TD` is given exactly if y has no dense rows.
    """
    top_k = weights_TA.shape[1]
    assert (dense_TD is None) == (y_TXD.shape[1] > top_k)
    on_cpu = runs_numba(y_TXD, y_TXD.shape[-1])
    if on_cpu or not runs_triton(y_TXD):
        compute = combine.combine_experts if on_cpu else combine_experts_reference
        return compute(
            y_TXD,
            weights_TA,
            dense_TD,
            routed_norm_D,
            dense_norm_D,
            post_norm_D,
            residual_TD,
            eps,
            scalar_1,
            next_weight_D,
        )
    num_tokens, num_rows, dim = y_TXD.shape
    assert y_TXD.is_contiguous() and weights_TA.is_contiguous() and residual_TD.stride(1) == 1
    assert dense_TD is None or dense_TD.stride(1) == 1
    out_TD = residual_TD.new_empty(num_tokens, dim)
    next_TD = None if next_weight_D is None else residual_TD.new_empty(num_tokens, dim)
    _combine_kernel[(num_tokens,)](
        y_TXD,
        weights_TA,
        dense_TD,
        routed_norm_D,
        dense_norm_D,
        post_norm_D,
        residual_TD,
        scalar_1,
        next_weight_D,
        out_TD,
        next_TD,
        0 if dense_TD is None else dense_TD.stride(0),
        residual_TD.stride(0),
        dim,
        eps,
        TOP_K=top_k,
        NUM_ROWS=num_rows,
        **row_tile(dim),
    )
    return out_TD, next_TD
