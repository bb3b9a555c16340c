"""Gemma's attention over paged keys and values: local, global, and global with K = RoPE(w ⊙ V).

T tokens   S sequences   D model width   H query heads   G kv heads   K head width
C values of a stored key row
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bezel.engine.batch import Batch, WantedRows
from bezel.engine.kv_cache import KVCache
from bezel.engine.layers.linear import Linear
from bezel.engine.layers.norm import RMSNorm
from bezel.engine.model_config import LayerConfig, ModelConfig
from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.kv_pages import NO_SLOT, write_kv
from bezel.kernels.prefill_attention import global_prefill_attention, local_prefill_attention
from bezel.kernels.qkv import QKVShape, rotate_and_store_global, rotate_and_store_local

CosSin = tuple[Tensor, Tensor]


@dataclass(slots=True)
class AttentionContext:
    """What the layers of one step share.

    `fresh` keeps a local layer's new keys and values until the last layer that reads them is done;
    `key_weights` the k_norm weight of global layers, whose keys may be stored without it.
    """

    batch: Batch
    kv_cache: KVCache
    local_rotary: CosSin
    global_rotary: CosSin
    fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    key_weights: dict[int, Tensor] = field(default_factory=dict)

    def narrowed(self, wanted: WantedRows) -> "AttentionContext":
        """To go on with the rows that are wanted, once no more keys and values are made.

        Those of chunks that don't stay whole are stored: their last rows read pages from now on.
        """
        n, slots = self.batch.num_decode_tokens, self.batch.local.slot_mapping_T
        chunk_rows = wanted.rows_N[wanted.batch.num_decodes :]
        slots_T = slots.index_fill(0, chunk_rows, NO_SLOT)[n:]
        fresh = {}
        for layer, (k_TGK, v_TGK) in self.fresh.items():
            k_cache, v_cache = self.kv_cache.caches(layer)
            assert v_cache is not None
            write_kv(k_TGK, k_cache, slots_T)
            write_kv(v_TGK, v_cache, slots_T)
            fresh[layer] = (k_TGK[chunk_rows - n], v_TGK[chunk_rows - n])
        return AttentionContext(
            wanted.batch,
            self.kv_cache,
            _rows(self.local_rotary, wanted.rows_N),
            _rows(self.global_rotary, wanted.rows_N),
            fresh,
            self.key_weights,
        )


class Attention(nn.Module):
    """Projections and norms of one layer, and the attention of its kind.

    Layers that share KV have a query projection only. `fused` tells the loader which rows of
    `qkv_proj` a checkpoint tensor fills.
    """

    def __init__(self, model: ModelConfig, layer: LayerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        shape = model.attention(layer)
        self.layer, self.shape, self.eps = layer, shape, model.rms_norm_eps
        self.qkv_shape = QKVShape(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            has_value_norm=model.family == "gemma4",
            key_is_value=shape.key_is_value,
        )
        self.last_reader = max(x.index for x in model.layers if x.kv_layer == layer.kv_layer)
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.fused = {"q_proj": ("qkv_proj", slice(0, q))}
        self.q_norm = RMSNorm(shape.head_dim, self.eps)
        if layer.owns_kv:
            self.k_norm = RMSNorm(shape.head_dim, self.eps)
            self.fused["k_proj"] = ("qkv_proj", slice(q, q + kv))
            if not shape.key_is_value:
                self.fused["v_proj"] = ("qkv_proj", slice(q + kv, q + 2 * kv))
        num_rows = max(rows.stop for _, rows in self.fused.values())
        self.qkv_proj = Linear(model.hidden_size, num_rows, dtype)
        self.o_proj = Linear(q, model.hidden_size, dtype)

    def store(self, x_TD: Tensor, context: AttentionContext) -> Tensor:
        """Queries of all rows; new keys and values go to their pages, or wait in `context.fresh`
        where these may be pages that a chunk still reads."""
        qkv_TNK = self.qkv_proj(x_TD).view(len(x_TD), -1, self.shape.head_dim)
        return (self._store_local if self.layer.is_local else self._store_global)(qkv_TNK, context)

    def forward(self, q_THK: Tensor, context: AttentionContext) -> Tensor:
        """What the queries find, projected: T×D."""
        o_THK = (self._local if self.layer.is_local else self._global)(q_THK, context)
        out_TD: Tensor = self.o_proj(o_THK.flatten(1))
        return out_TD

    def _store_local(self, qkv_TNK: Tensor, ctx: AttentionContext) -> Tensor:
        k_cache, v_cache = ctx.kv_cache.caches(self.layer.kv_layer)
        assert v_cache is not None
        q_THK, k_TGK, v_TGK = rotate_and_store_local(
            qkv_TNK,
            self.qkv_shape,
            self.eps,
            self.q_norm.weight,
            self.k_norm.weight if self.layer.owns_kv else None,
            *ctx.local_rotary,
            k_cache,
            v_cache,
            ctx.batch.local.slot_mapping_T,
            num_stored=ctx.batch.num_decode_tokens,
        )
        if k_TGK is not None and v_TGK is not None:
            ctx.fresh[self.layer.index] = (k_TGK, v_TGK)
        return q_THK

    def _store_global(self, qkv_TNK: Tensor, ctx: AttentionContext) -> Tensor:
        if self.layer.owns_kv:
            ctx.key_weights[self.layer.index] = self.k_norm.weight
        return rotate_and_store_global(
            qkv_TNK,
            self.qkv_shape,
            self.eps,
            self.q_norm.weight,
            ctx.key_weights[self.layer.kv_layer],
            *ctx.global_rotary,
            *ctx.kv_cache.caches(self.layer.kv_layer),
            ctx.batch.global_.slot_mapping_T,
            owns_kv=self.layer.owns_kv,
        )

    def _local(self, q_THK: Tensor, ctx: AttentionContext) -> Tensor:
        batch, n, shape = ctx.batch, ctx.batch.num_decode_tokens, self.shape
        assert shape.window is not None
        pages = batch.local
        k_cache, v_cache = ctx.kv_cache.caches(self.layer.kv_layer)
        assert v_cache is not None
        decoded = self._decode(q_THK[:n], k_cache, v_cache, pages.page_table_SP, batch)
        if not batch.has_chunks:
            return _joined(decoded)
        k_TGK, v_TGK = ctx.fresh[self.layer.kv_layer]
        assert batch.cu_seqlens_q_C1 is not None
        prefilled = local_prefill_attention(
            q_THK[n:],
            k_TGK,
            v_TGK,
            k_cache,
            v_cache,
            pages.page_table_SP[batch.num_decodes :],
            batch.cu_seqlens_q_C1,
            batch.seq_lens_S[batch.num_decodes :],
            batch.max_q_len,
            shape.scale,
            shape.window,
        )
        if self.layer.index == self.last_reader:
            # Only now: a chunk's new pages may be the very pages that its first queries read.
            write_kv(k_TGK, k_cache, pages.slot_mapping_T[n:])
            write_kv(v_TGK, v_cache, pages.slot_mapping_T[n:])
            del ctx.fresh[self.layer.kv_layer]
        return _joined(decoded, prefilled)

    def _global(self, q_THC: Tensor, ctx: AttentionContext) -> Tensor:
        batch, n, shape = ctx.batch, ctx.batch.num_decode_tokens, self.shape
        pages = batch.global_
        k_cache, v_cache = ctx.kv_cache.caches(self.layer.kv_layer)
        decoded = self._decode(q_THC[:n], k_cache, v_cache, pages.page_table_SP, batch)
        if not batch.has_chunks:
            return _joined(decoded)
        assert batch.cu_seqlens_q_C1 is not None
        prefilled = global_prefill_attention(
            q_THC[n:],
            k_cache,
            v_cache,
            pages.page_table_SP[batch.num_decodes :],
            batch.cu_seqlens_q_C1,
            batch.seq_lens_S[batch.num_decodes :],
            batch.max_q_len,
            shape.scale,
            shape.head_dim,
        )
        return _joined(decoded, prefilled)

    def _decode(
        self,
        q_THC: Tensor,
        k_cache_PBGC: Tensor,
        v_cache_PBGK: Tensor | None,
        page_table_SP: Tensor,
        batch: Batch,
    ) -> Tensor | None:
        if batch.num_decodes == 0:
            return None
        return decode_attention(
            q_THC,
            k_cache_PBGC,
            v_cache_PBGK,
            page_table_SP[: batch.num_decodes],
            batch.seq_lens_S[: batch.num_decodes],
            self.shape.scale,
            self.shape.window,
            self.shape.head_dim,
            batch.decode_q_len,
        )


def _rows(cos_sin: CosSin, rows_N: Tensor) -> CosSin:
    cos_TJ, sin_TJ = cos_sin
    return cos_TJ[rows_N], sin_TJ[rows_N]


def _joined(*parts: Tensor | None) -> Tensor:
    """Decodes before chunks, whichever there are."""
    found = [part for part in parts if part is not None]
    return found[0] if len(found) == 1 else torch.cat(found)
