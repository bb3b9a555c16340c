"""Joins the experts' rows with the dense MLP and adds them to the residual.

    routed = Σ_j w[j] · y[j]  over the A experts;   dense = Σ_i y[A + i], or given
    mixed  = rms(dense) · dense_norm + rms(routed) · routed_norm
    out    = (residual + rms(mixed) · post_norm) · scalar;   next = rms(out) · next_weight
    rms(x) = x / sqrt(mean(x²) + eps)

T tokens   D model width   A experts per token   X = A + n rows per token, n of them dense
y_TXD, dense_TD, residual_TD in one dtype; weights_TA and the norms' weights float32; scalar_1 any
→ out_TD, next_TD in the residual's dtype. The kernel computes in float32 and rounds at the two
stores; the reference rounds every step as the torch modules do.

One program has one token, its whole row at once:

    y[0] … y[A-1] | y[A] … y[X-1] or dense | residual   each [BLOCK_D]   ──▶  out, next
"""

from torch import Tensor

from bezel.kernels.jit import runs_triton, tl, triton
from bezel.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference

_NUM_WARPS = 8


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
def _rms(b_x, dim, eps):
    """b_x is 0 beyond the row's end."""
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / dim + eps)


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
    dim,
    eps,
    stride_dt,
    stride_rt,
    TOP_K: tl.constexpr,
    NUM_DENSE: tl.constexpr,
    HAS_SCALAR: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < dim
    p_y = y_ptr + i_t * (TOP_K + NUM_DENSE) * dim + o_d
    b_routed = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(TOP_K):
        weight = tl.load(weights_ptr + i_t * TOP_K + j)
        b_routed += weight * tl.load(p_y + j * dim, mask=m_d, other=0.0).to(tl.float32)
    if NUM_DENSE == 0:
        p_dense = dense_ptr + i_t * stride_dt + o_d
        b_dense = tl.load(p_dense, mask=m_d, other=0.0).to(tl.float32)
    else:
        b_dense = tl.zeros([BLOCK_D], tl.float32)
        for j in tl.static_range(TOP_K, TOP_K + NUM_DENSE):
            b_dense += tl.load(p_y + j * dim, mask=m_d, other=0.0).to(tl.float32)
    b_mixed = _rms(b_dense, dim, eps) * tl.load(dense_norm_ptr + o_d, mask=m_d, other=0.0)
    b_mixed += _rms(b_routed, dim, eps) * tl.load(routed_norm_ptr + o_d, mask=m_d, other=0.0)
    b_out = _rms(b_mixed, dim, eps) * tl.load(post_norm_ptr + o_d, mask=m_d, other=0.0)
    p_residual = residual_ptr + i_t * stride_rt + o_d
    b_out += tl.load(p_residual, mask=m_d, other=0.0).to(tl.float32)
    if HAS_SCALAR:
        b_out *= tl.load(scalar_ptr).to(tl.float32)
    tl.store(out_ptr + i_t * dim + o_d, b_out, mask=m_d)
    if HAS_NEXT:
        b_next = _rms(b_out, dim, eps) * tl.load(next_weight_ptr + o_d, mask=m_d, other=0.0)
        tl.store(next_ptr + i_t * dim + o_d, b_next, mask=m_d)


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
    if not runs_triton(y_TXD):
        return combine_experts_reference(
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
        dim,
        eps,
        0 if dense_TD is None else dense_TD.stride(0),
        residual_TD.stride(0),
        TOP_K=top_k,
        NUM_DENSE=num_rows - top_k,
        HAS_SCALAR=scalar_1 is not None,
        HAS_NEXT=next_TD is not None,
        BLOCK_D=triton.next_power_of_2(dim),
        num_warps=_NUM_WARPS,
    )
    return out_TD, next_TD
