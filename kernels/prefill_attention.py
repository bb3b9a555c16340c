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

    q_THC   k_TGC v_TGK fresh   k_cache_PBGC v_cache_PBGK       float32, float16 or bfloat16
    page_table_SP   cu_seqlens_q_S1, S+1 offsets into T   seq_lens_S, after the chunk      int64
    max_q_len, the longest chunk                                                → o_THK

Every row of T belongs to a chunk. The references come first; prefill_kernels.py holds the Triton
kernels and tells what one program computes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.cpu.prefill_attention import prefill_attention_cpu, runs_prefill
from bezel.kernels.jit import runs_triton, triton
from bezel.kernels.kv_pages import gather_kv, position_slots
from bezel.kernels.prefill_kernels import global_kernel, local_kernel, prefill_tile

QUERY_BLOCK = 256  # the reference's queries per product: skips keys that none of them sees
LOG2_E = 1.4426950408889634


def local_prefill_reference(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    k_cache_PBGK: Tensor,
    v_cache_PBGK: Tensor,
    page_table_SP: Tensor,
    cu_seqlens_q_S1: Tensor,
    seq_lens_S: Tensor,
    scale: float,
    window: int,
    last_key_T: Tensor | None,
) -> Tensor:
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


def global_prefill_reference(
    q_THC: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    cu_seqlens_q_S1: Tensor,
    seq_lens_S: Tensor,
    scale: float,
    value_dim: int,
) -> Tensor:
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
    if not runs_triton(q_THK):
        if runs_prefill(q_THK, q_THK.shape[2]):
            return prefill_attention_cpu(
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
                q_THK.shape[2],
                last_key_T,
            )
        return local_prefill_reference(
            q_THK,
            k_TGK,
            v_TGK,
            k_cache_PBGK,
            v_cache_PBGK,
            page_table_SP,
            cu_seqlens_q_S1,
            seq_lens_S,
            scale,
            window,
            last_key_T,
        )
    num_heads, head_dim = q_THK.shape[1:]
    for x in (q_THK, k_TGK, v_TGK):
        assert x.stride()[1:] == (head_dim, 1), "a token's heads must be contiguous"
    page_size, num_kv_heads = _check_pages(k_cache_PBGK, v_cache_PBGK, page_table_SP)
    group, tile = num_heads // num_kv_heads, prefill_tile(q_THK, is_packed=False)
    out_THK = q_THK.new_empty(q_THK.shape)
    grid = (triton.cdiv(max_q_len, tile.rows // group), num_kv_heads, len(seq_lens_S))
    if 0 in grid:
        return out_THK
    local_kernel[grid](
        q_THK,
        k_TGK,
        v_TGK,
        k_cache_PBGK,
        v_cache_PBGK,
        page_table_SP,
        cu_seqlens_q_S1,
        seq_lens_S,
        last_key_T,
        out_THK,
        q_THK.stride(0),
        k_TGK.stride(0),
        v_TGK.stride(0),
        k_cache_PBGK.stride(0),
        k_cache_PBGK.stride(1),
        page_table_SP.stride(0),
        out_THK.stride(0),
        scale * LOG2_E,
        WINDOW=window,
        PAGE_SIZE=page_size,
        RING=page_table_SP.shape[1],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_K=_block(head_dim),
        BLOCK_M=tile.rows,
        BLOCK_L=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
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
    if not runs_triton(q_THC):
        if runs_prefill(q_THC, value_dim):
            return prefill_attention_cpu(
                q_THC,
                None,
                None,
                k_cache_PBGC,
                v_cache_PBGK,
                page_table_SP,
                cu_seqlens_q_S1,
                seq_lens_S,
                max_q_len,
                scale,
                None,
                value_dim,
            )
        return global_prefill_reference(
            q_THC,
            k_cache_PBGC,
            v_cache_PBGK,
            page_table_SP,
            cu_seqlens_q_S1,
            seq_lens_S,
            scale,
            value_dim,
        )
    num_heads, width = q_THC.shape[1:]
    assert q_THC.stride()[1:] == (width, 1), "a token's heads must be contiguous"
    page_size, num_kv_heads = _check_pages(k_cache_PBGC, v_cache_PBGK, page_table_SP)
    group, tile = num_heads // num_kv_heads, prefill_tile(q_THC, v_cache_PBGK is None)
    out_THK = q_THC.new_empty(*q_THC.shape[:2], value_dim)
    grid = (triton.cdiv(max_q_len, tile.rows // group), num_kv_heads, len(seq_lens_S))
    if 0 in grid:
        return out_THK
    global_kernel[grid](
        q_THC,
        k_cache_PBGC,
        v_cache_PBGK,
        page_table_SP,
        cu_seqlens_q_S1,
        seq_lens_S,
        out_THK,
        q_THC.stride(0),
        k_cache_PBGC.stride(0),
        k_cache_PBGC.stride(1),
        page_table_SP.stride(0),
        out_THK.stride(0),
        scale * LOG2_E,
        PAGE_SIZE=page_size,
        GROUP=group,
        VALUE_DIM=value_dim,
        NUM_TURNED=width - value_dim,
        BLOCK_K=_block(value_dim),
        BLOCK_J=_block(width - value_dim),
        BLOCK_M=tile.rows,
        BLOCK_L=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_THK


def _block(width: int) -> int:
    """Block that holds `width` values; the hardware multiplies no fewer than 16."""
    block: int = max(16, triton.next_power_of_2(width))
    return block


def _check_pages(
    k_cache_PBGC: Tensor, v_cache_PBGK: Tensor | None, page_table_SP: Tensor
) -> tuple[int, int]:
    """Page size and number of kv heads of caches laid out as the kernels expect."""
    page_size, num_kv_heads, width = k_cache_PBGC.shape[1:]
    assert k_cache_PBGC.stride()[1:] == (num_kv_heads * width, width, 1)
    assert v_cache_PBGK is None or v_cache_PBGK.stride() == k_cache_PBGC.stride()
    assert page_table_SP.stride(1) == 1
    return page_size, num_kv_heads
