"""The torch reference of decode attention: see decode_attention.py for the formula and shapes.

Sequences of like length are computed together, so a long one doesn't pad the short ones.

S sequences   Q queries of each   L positions, padded   R rows of a kv head: Q tokens × H/G heads
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.kv_pages import gather_kv, position_slots


def decode_attention_reference(
    q_THC: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    seq_lens_S: Tensor,
    scale: float,
    window: int | None,
    value_dim: int,
    q_len: int,
) -> Tensor:
    num_tokens, num_heads, width = q_THC.shape
    q_SQHC = q_THC.reshape(-1, q_len, num_heads, width)
    out_SQHK = q_THC.new_zeros(num_tokens // q_len, q_len, num_heads, value_dim)
    first_S = torch.zeros_like(seq_lens_S)
    if window is not None:
        first_S = (seq_lens_S - q_len + 1 - window).clamp_min(0)
    for rows in _rows_of_like_length((seq_lens_S - first_S).tolist()):
        out_SQHK[rows] = _padded_attention(
            q_SQHC[rows],
            k_cache_PBGC,
            v_cache_PBGK,
            page_table_SP[rows],
            first_S[rows],
            seq_lens_S[rows],
            scale,
            window,
            value_dim,
        )
    return out_SQHK.flatten(0, 1)


def _padded_attention(
    q_SQHC: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    first_S: Tensor,
    seq_lens_S: Tensor,
    scale: float,
    window: int | None,
    value_dim: int,
) -> Tensor:
    num_seqs, q_len, num_heads, width = q_SQHC.shape
    page_size, num_kv_heads = k_cache_PBGC.shape[1:3]
    group = num_heads // num_kv_heads
    span = torch.arange(int((seq_lens_S - first_S).max()), device=q_SQHC.device)
    positions_SL = first_S[:, None] + span
    is_seen_SQL = _is_seen(positions_SL, seq_lens_S, window, q_len)
    # Padding repeats the last query's own position: whatever lies in unused slots, NaN included,
    # is never read, because a zero weight would not cancel it.
    positions_SL = torch.minimum(positions_SL, seq_lens_S[:, None] - 1)
    slots_SL = position_slots(positions_SL, page_table_SP, page_size)
    k_SGLC = gather_kv(k_cache_PBGC, slots_SL).transpose(1, 2)
    v_SGLK = k_SGLC if v_cache_PBGK is None else gather_kv(v_cache_PBGK, slots_SL).transpose(1, 2)
    q_SQGC = q_SQHC.view(num_seqs, q_len, num_kv_heads, group * width)
    q_SGRC = q_SQGC.transpose(1, 2).reshape(num_seqs, num_kv_heads, q_len * group, width)
    mask_S1RL = is_seen_SQL[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)[:, None]
    out = F.scaled_dot_product_attention(q_SGRC, k_SGLC, v_SGLK, attn_mask=mask_S1RL, scale=scale)
    out_SGRK = out[..., :value_dim]
    out_SGQK = out_SGRK.reshape(num_seqs, num_kv_heads, q_len, group * value_dim)
    return out_SGQK.transpose(1, 2).reshape(num_seqs, q_len, num_heads, value_dim)


def _is_seen(positions_SL: Tensor, seq_lens_S: Tensor, window: int | None, q_len: int) -> Tensor:
    """Which positions each query sees: S×Q×L."""
    query = torch.arange(q_len, device=seq_lens_S.device)
    query_SQ1 = (seq_lens_S[:, None] - q_len + query)[..., None]
    is_seen_SQL = positions_SL[:, None] <= query_SQ1
    if window is not None and q_len > 1:  # a single query sees all from the first position on
        is_seen_SQL &= positions_SL[:, None] > query_SQ1 - window
    return is_seen_SQL


def _rows_of_like_length(lengths: list[int]) -> list[list[int]]:
    """Rows grouped by the power of two their length rounds up to, without the empty ones."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            groups.setdefault((length - 1).bit_length(), []).append(row)
    return list(groups.values())
