"""Attention of one query token per sequence over paged keys and values.

    o[s, h] = softmax(scale · q[s, h] · K[s]ᵀ) V[s]       over positions [first(s), seq_lens[s])

with first = 0, or seq_lens − window on local layers; the query is the last of those positions and
its key is already in its page. Query heads h·H/G … share kv head g.

    q_SHC            C values per key
    k_cache_PBGC     v_cache_PBGK, or None: then V is the first `value_dim` values of the key row
    page_table_SP    int64; a ring when `window` is given (see kv_pages.position_slots)
    seq_lens_S       int64, the query included
    → o_SHK          dtype of q; softmax in float32

Sequences of like length are computed together, so a long one doesn't pad the short ones.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.kv_pages import gather_kv, position_slots


def decode_attention(
    q_SHC: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    seq_lens_S: Tensor,
    scale: float,
    window: int | None,
    value_dim: int,
) -> Tensor:
    num_seqs, num_heads, _ = q_SHC.shape
    first_S = torch.zeros_like(seq_lens_S) if window is None else (seq_lens_S - window).clamp_min(0)
    out_SHK = q_SHC.new_empty(num_seqs, num_heads, value_dim)
    for rows in _rows_of_like_length((seq_lens_S - first_S).tolist()):
        out_SHK[rows] = _padded_attention(
            q_SHC[rows],
            k_cache_PBGC,
            v_cache_PBGK,
            page_table_SP[rows],
            first_S[rows],
            seq_lens_S[rows],
            scale,
            value_dim,
        )
    return out_SHK


def _padded_attention(
    q_SHC: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    first_S: Tensor,
    seq_lens_S: Tensor,
    scale: float,
    value_dim: int,
) -> Tensor:
    num_seqs, num_heads, width = q_SHC.shape
    page_size, num_kv_heads = k_cache_PBGC.shape[1:3]
    span = torch.arange(int((seq_lens_S - first_S).max()), device=q_SHC.device)
    positions_SL = first_S[:, None] + span
    is_live_SL = positions_SL < seq_lens_S[:, None]
    # Padding repeats the query's own position: whatever lies in unused slots, NaN included, is
    # never read, because a zero weight would not cancel it.
    positions_SL = torch.minimum(positions_SL, seq_lens_S[:, None] - 1)
    slots_SL = position_slots(positions_SL, page_table_SP, page_size)
    k_SGLC = gather_kv(k_cache_PBGC, slots_SL).transpose(1, 2)
    v_SGLK = k_SGLC if v_cache_PBGK is None else gather_kv(v_cache_PBGK, slots_SL).transpose(1, 2)
    q_SGRC = q_SHC.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, width)
    mask = is_live_SL[:, None, None, :]
    out = F.scaled_dot_product_attention(q_SGRC, k_SGLC, v_SGLK, attn_mask=mask, scale=scale)
    return out.reshape(num_seqs, num_heads, -1)[..., :value_dim]


def _rows_of_like_length(lengths: list[int]) -> list[list[int]]:
    """Rows grouped by the power of two their length rounds up to."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(row)
    return list(groups.values())
