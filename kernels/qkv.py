"""What stands between the fused projection of a layer and its attention: the norms of each head,
RoPE, and the write to the paged cache.

    q = RoPE(rms(x_q) · w_q)     k = RoPE(rms(x_k) · w_k)     v = rms(x_v)  (Gemma 3: v = x_v)

Global layers with K = RoPE(w_k ⊙ V) have one projection for both. Of their keys only the turned
pairs are stored, behind the value; the rest of the key is w_k ⊙ v, and queries bring that w_k along:

    stored row   [ v (K) | turned pairs of k (2 J) ]                                    C = K + 2 J
    query        [ q ⊙ w_k, zero where pairs are turned (K) | turned pairs of q (2 J) ]

T tokens   N heads of the projection: H of q, then G of k, then G of v   H query heads
G kv heads   K head width   J turned pairs   C values of a packed row   P pages   B tokens per page

Projection, caches and results have one float dtype; weights, cosines and sines are float32, slots
int64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bezel.kernels.kv_pages import write_kv
from bezel.kernels.rms_norm import rms_norm_reference
from bezel.kernels.rotary import apply_rotary, turned_pairs


@dataclass(frozen=True)
class QKVShape:
    """Heads of a layer. `key_is_value`: one projection for both, and K = RoPE(w_k ⊙ V)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_value_norm: bool
    key_is_value: bool


def rotate_and_store_local_reference(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    q_weight_K: Tensor,
    k_weight_K: Tensor | None,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
    k_cache_PBGK: Tensor | None,
    v_cache_PBGK: Tensor | None,
    slot_mapping_T: Tensor,
    num_stored: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Norms are rounded to the projection's dtype before they are turned."""
    q_THK = _turned_queries(qkv_TNK, shape, eps, q_weight_K, cos_TJ, sin_TJ)
    if k_weight_K is None:
        return q_THK, None, None
    assert k_cache_PBGK is not None and v_cache_PBGK is not None
    k_TGK, v_TGK = _keys_and_values(qkv_TNK, shape, eps, k_weight_K)
    k_TGK = apply_rotary(k_TGK, cos_TJ, sin_TJ)
    write_kv(k_TGK[:num_stored], k_cache_PBGK, slot_mapping_T[:num_stored])
    write_kv(v_TGK[:num_stored], v_cache_PBGK, slot_mapping_T[:num_stored])
    return q_THK, k_TGK[num_stored:], v_TGK[num_stored:]


def rotate_and_store_global_reference(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    slot_mapping_T: Tensor,
    owns_kv: bool,
) -> Tensor:
    """Norms are rounded to the projection's dtype before they are turned or multiplied by w_k."""
    if owns_kv:
        k_TGK, v_TGK = _keys_and_values(qkv_TNK, shape, eps, k_weight_K)
        if shape.key_is_value:
            k_TGC = torch.cat((v_TGK, turned_pairs(k_TGK, cos_TJ, sin_TJ)), dim=-1)
            write_kv(k_TGC, k_cache_PBGC, slot_mapping_T)
        else:
            assert v_cache_PBGK is not None
            write_kv(apply_rotary(k_TGK, cos_TJ, sin_TJ), k_cache_PBGC, slot_mapping_T)
            write_kv(v_TGK, v_cache_PBGK, slot_mapping_T)
    if not shape.key_is_value:
        return _turned_queries(qkv_TNK, shape, eps, q_weight_K, cos_TJ, sin_TJ)
    q_THK = rms_norm_reference(qkv_TNK[:, : shape.num_heads], q_weight_K, eps)
    num_pairs, half = cos_TJ.shape[1], shape.head_dim // 2
    folded = q_THK.float() * k_weight_K
    folded[..., :num_pairs] = 0
    folded[..., half : half + num_pairs] = 0
    return torch.cat((folded.to(q_THK.dtype), turned_pairs(q_THK, cos_TJ, sin_TJ)), dim=-1)


def _turned_queries(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    q_weight_K: Tensor,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
) -> Tensor:
    q_THK = rms_norm_reference(qkv_TNK[:, : shape.num_heads], q_weight_K, eps)
    return apply_rotary(q_THK, cos_TJ, sin_TJ)


def _keys_and_values(
    qkv_TNK: Tensor, shape: QKVShape, eps: float, k_weight_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys before RoPE, and values."""
    first_value = shape.num_heads + shape.num_kv_heads
    k_TGK = qkv_TNK[:, shape.num_heads : first_value]
    v_TGK = k_TGK if shape.key_is_value else qkv_TNK[:, first_value:]
    if shape.has_value_norm:
        v_TGK = rms_norm_reference(v_TGK, None, eps)
    return rms_norm_reference(k_TGK, k_weight_K, eps), v_TGK


def rotate_and_store_local(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    q_weight_K: Tensor,
    k_weight_K: Tensor | None,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
    k_cache_PBGK: Tensor | None,
    v_cache_PBGK: Tensor | None,
    slot_mapping_T: Tensor,
    num_stored: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries of a local layer, and what its attention needs of new keys and values.

    Tokens [0, num_stored) are stored at their slots, unless that is `NO_SLOT`. Keys and values of
    the others come back: (q_THK, k_TGK, v_TGK) with T = all tokens, then those from num_stored on.
    Without `k_weight_K` the projection holds queries only and (q_THK, None, None) comes back.
    """
    return rotate_and_store_local_reference(
        qkv_TNK,
        shape,
        eps,
        q_weight_K,
        k_weight_K,
        cos_TJ,
        sin_TJ,
        k_cache_PBGK,
        v_cache_PBGK,
        slot_mapping_T,
        num_stored,
    )


def rotate_and_store_global(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    slot_mapping_T: Tensor,
    owns_kv: bool,
) -> Tensor:
    """Queries of a global layer, after its new keys and values are stored.

    With `owns_kv` every token is stored at its slot, unless that is `NO_SLOT`; without, the
    projection holds queries only. Returns q_THK, or packed queries q_THC if `shape.key_is_value`:
    then k_cache_PBGC has packed rows, there is no v_cache_PBGK, and `k_weight_K` is that of the
    layer whose keys are stored.
    """
    return rotate_and_store_global_reference(
        qkv_TNK,
        shape,
        eps,
        q_weight_K,
        k_weight_K,
        cos_TJ,
        sin_TJ,
        k_cache_PBGC,
        v_cache_PBGK,
        slot_mapping_T,
        owns_kv,
    )
