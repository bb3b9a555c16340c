"""Token embedding times a constant, alone or with the norm in front of the first layer.

    scaled_embedding:  x[t] = scale · weight[token_ids[t]]
    embed_and_norm:    the same x, and z = rms(x) · norm_weight

T tokens   V vocabulary   D width of the table: the model's, or all layers' per-layer embeddings.
token_ids_T int64, weight_VD any float dtype, which x and z have too; norm_weight_D float32.
Computed in float32, x and z rounded once each.

    token_ids_T          weight_VD                        x_TD
      t ─► id ─────────► row id, at id · D  ── · scale ─► row t     a program a row; without the
                         (beyond 2³¹ in big tables)                 norm, BLOCK_D columns of one
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.cpu import embedding as cpu
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.jit import runs_triton, tl, triton
from bezel.kernels.rms_norm import inverse_rms, rms_norm_reference, row_tile


def scaled_embedding_reference(token_ids_T: Tensor, weight_VD: Tensor, scale: float) -> Tensor:
    return F.embedding(token_ids_T, weight_VD) * scale


def embed_and_norm_reference(
    token_ids_T: Tensor, weight_VD: Tensor, scale: float, norm_weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """z comes from the rounded x."""
    x_TD = scaled_embedding_reference(token_ids_T, weight_VD, scale)
    return x_TD, rms_norm_reference(x_TD, norm_weight_D, eps)


@triton.jit
def _scaled_embedding_kernel(
    token_ids_ptr, weight_ptr, x_ptr, stride_wv, scale, D, BLOCK_D: tl.constexpr
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # one value
    i_v = tl.load(token_ids_ptr + i_t).to(tl.int64)
    # [BLOCK_D]
    b_x = tl.load(weight_ptr + i_v * stride_wv + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(x_ptr + i_t * D + o_d, b_x * scale, mask=m_d)


@triton.jit
def _embed_and_norm_kernel(
    token_ids_ptr,
    weight_ptr,
    norm_weight_ptr,
    x_ptr,
    z_ptr,
    stride_wv,
    scale,
    D,
    eps,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # [BLOCK_D]
    b_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
    # one value
    i_v = tl.load(token_ids_ptr + i_t).to(tl.int64)
    # [BLOCK_D]
    b_x = tl.load(weight_ptr + i_v * stride_wv + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x = (b_x * scale).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + i_t * D + o_d, b_x, mask=m_d)
    # Of x as it was stored, so that a norm of the stored x would come to the same.
    b_stored = b_x.to(tl.float32)
    b_z = b_stored * inverse_rms(b_stored, D, eps) * b_weight
    tl.store(z_ptr + i_t * D + o_d, b_z, mask=m_d)


def scaled_embedding(token_ids_T: Tensor, weight_VD: Tensor, scale: float) -> Tensor:
    """x_TD in the weight's dtype. Ids lie in [0, V); `scale` is a value of the weight's dtype."""
    if runs_numba(weight_VD, weight_VD.shape[1]):
        return cpu.scaled_embedding(token_ids_T, weight_VD, scale)
    if not runs_triton(weight_VD):
        return scaled_embedding_reference(token_ids_T, weight_VD, scale)
    num_tokens, width = len(token_ids_T), weight_VD.shape[1]
    assert token_ids_T.stride(0) == 1 and weight_VD.stride(1) == 1
    x_TD = torch.empty(num_tokens, width, dtype=weight_VD.dtype, device=weight_VD.device)
    tile = row_tile(min(width, 1024))
    _scaled_embedding_kernel[(num_tokens, triton.cdiv(width, tile["BLOCK_D"]))](
        token_ids_T, weight_VD, x_TD, weight_VD.stride(0), scale, width, **tile
    )
    return x_TD


def embed_and_norm(
    token_ids_T: Tensor, weight_VD: Tensor, scale: float, norm_weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x_TD, z_TD) in the weight's dtype, with ids and scale as for `scaled_embedding`."""
    if runs_numba(weight_VD, weight_VD.shape[1]):
        return cpu.embed_and_norm(token_ids_T, weight_VD, scale, norm_weight_D, eps)
    if not runs_triton(weight_VD):
        return embed_and_norm_reference(token_ids_T, weight_VD, scale, norm_weight_D, eps)
    num_tokens, width = len(token_ids_T), weight_VD.shape[1]
    assert token_ids_T.stride(0) == 1 and weight_VD.stride(1) == 1
    x_TD = torch.empty(num_tokens, width, dtype=weight_VD.dtype, device=weight_VD.device)
    z_TD = torch.empty_like(x_TD)
    _embed_and_norm_kernel[(num_tokens,)](
        token_ids_T,
        weight_VD,
        norm_weight_D,
        x_TD,
        z_TD,
        weight_VD.stride(0),
        scale,
        width,
        eps,
        **row_tile(width),
    )
    return x_TD, z_TD
