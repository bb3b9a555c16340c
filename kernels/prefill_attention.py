"""Causal attention of prompt chunks, several query tokens per sequence.

    o[t, h] = softmax(scale · q[t, h] · Kᵀ) V             over positions (p_t − window, last_t]

with last_t = p_t, or the end of the image that token t belongs to. *Global* layers read every key,
the chunk's own included, from pages. *Local* layers read two sources: the last `window − 1` tokens
before the chunk from pages, the chunk itself from the fresh keys and values, so a chunk of any
length needs no more pages than the window.

    positions of sequence s       start − window + 1      start                  end
    local: source                 [ pages (ring table) ]  [ fresh k, v          ]
    global: source                [ pages ......................................]
    one block of queries                                      [== b ==]
    keys it is multiplied with               [== window − 1 ==|== b ==]

    q_THC   k_TGC v_TGK fresh   k_cache_PBGC v_cache_PBGK   page_table_SP int64
    cu_seqlens_q_S1: S+1 offsets into T, int64   seq_lens_S: lengths after the chunk, int64
    max_q_len: the longest chunk                                                → o_THK
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.jit import runs_triton
from bezel.kernels.kv_pages import gather_kv, position_slots
from bezel.kernels.prefill_kernels import global_prefill, local_prefill

QUERY_BLOCK = 256  # queries per product: bounds the mask and skips keys outside the window


def local_prefill_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    k_cache_PBGK: Tensor,
    v_cache_PBGK: Tensor,
    page_table_SP: Tensor,
    cu_seqlens_q_S1: Tensor,
    seq_lens_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    last_key_T: Tensor | None = None,
) -> Tensor:
    """Two-source attention; `page_table_SP` is the ring table from before the chunk.

    `last_key_T` (int64) is the last position each query sees, its own or a later one of its chunk.
    """
    if runs_triton(q_THK):
        return local_prefill(
            q_THK,
            k_TGK,
            v_TGK,
            k_cache_PBGK,
            v_cache_PBGK,
            page_table_SP,
            cu_seqlens_q_S1,
            seq_lens_S,
            max_q_len,
            scale,
            window,
            last_key_T,
        )
    out_THK = torch.empty_like(q_THK)
    for s, rows, start, _ in _chunks(cu_seqlens_q_S1, seq_lens_S):
        first = max(0, start - window + 1)
        slots = _slots(first, start, page_table_SP[s], k_cache_PBGK.shape[1])
        k_LGK = torch.cat((gather_kv(k_cache_PBGK, slots), k_TGK[rows]))
        v_LGK = torch.cat((gather_kv(v_cache_PBGK, slots), v_TGK[rows]))
        last_key = None if last_key_T is None else last_key_T[rows] - first
        out_THK[rows] = _causal_attention(
            q_THK[rows], k_LGK, v_LGK, start - first, scale, window, last_key
        )
    return out_THK


def global_prefill_attention(
    q_THC: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    cu_seqlens_q_S1: Tensor,
    seq_lens_S: Tensor,
    max_q_len: int,
    scale: float,
    value_dim: int,
) -> Tensor:
    """Attention over pages that already hold the chunk. Without `v_cache_PBGK` the value is the
    first `value_dim` values of the key row."""
    if runs_triton(q_THC):
        return global_prefill(
            q_THC,
            k_cache_PBGC,
            v_cache_PBGK,
            page_table_SP,
            cu_seqlens_q_S1,
            seq_lens_S,
            max_q_len,
            scale,
            value_dim,
        )
    out_THK = q_THC.new_empty(*q_THC.shape[:2], value_dim)
    for s, rows, start, end in _chunks(cu_seqlens_q_S1, seq_lens_S):
        slots = _slots(0, end, page_table_SP[s], k_cache_PBGC.shape[1])
        k_LGC = gather_kv(k_cache_PBGC, slots)
        v_LGK = k_LGC if v_cache_PBGK is None else gather_kv(v_cache_PBGK, slots)
        out = _causal_attention(q_THC[rows], k_LGC, v_LGK, start, scale, window=None)
        out_THK[rows] = out[..., :value_dim]
    return out_THK


def _chunks(cu_seqlens_q_S1: Tensor, seq_lens_S: Tensor) -> Iterator[tuple[int, slice, int, int]]:
    """Sequence, rows in T, and positions [start, end) of every chunk that has tokens."""
    offsets = cu_seqlens_q_S1.tolist()
    for s, end in enumerate(seq_lens_S.tolist()):
        rows = slice(offsets[s], offsets[s + 1])
        if rows.start < rows.stop:
            yield s, rows, end - (rows.stop - rows.start), end


def _slots(first: int, end: int, page_table_P: Tensor, page_size: int) -> Tensor:
    positions = torch.arange(first, end, device=page_table_P.device)
    return position_slots(positions[None], page_table_P[None], page_size)[0]


def _causal_attention(
    q_THC: Tensor,
    k_LGC: Tensor,
    v_LGK: Tensor,
    num_past: int,
    scale: float,
    window: int | None,
    last_key_T: Tensor | None = None,
) -> Tensor:
    """Query t stands at key index `num_past + t`. Blocks of queries, keys cut to what they see."""
    out = []
    k_GLC, v_GLK = k_LGC.transpose(0, 1), v_LGK.transpose(0, 1)
    for row in range(0, len(q_THC), QUERY_BLOCK):
        q_BHC = q_THC[row : row + QUERY_BLOCK]
        first_query = num_past + row
        end = first_query + len(q_BHC)
        begin = 0 if window is None else max(0, first_query - window + 1)
        queries = torch.arange(first_query, end, device=q_THC.device)[:, None]
        last = queries
        if last_key_T is not None:
            last = last_key_T[row : row + QUERY_BLOCK, None]
            end = int(last.max()) + 1
        keys = torch.arange(begin, end, device=q_THC.device)
        mask = keys <= last
        if window is not None:
            mask &= keys > queries - window
        o_HBK = F.scaled_dot_product_attention(
            q_BHC.transpose(0, 1)[None],
            k_GLC[None, :, begin:end],
            v_GLK[None, :, begin:end],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        out.append(o_HBK[0].transpose(0, 1))
    return torch.cat(out)
