"""Gemma's attention over paged keys and values: local, global, and global with K = RoPE(w ⊙ V).

T tokens   S sequences   D model width   H query heads   G kv heads   K head width
C values of a stored key row
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bezel.engine.batch import Batch
from bezel.engine.kv_cache import KVCache
from bezel.engine.layers.linear import Linear
from bezel.engine.layers.norm import RMSNorm
from bezel.engine.model_config import LayerConfig, ModelConfig
from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.kv_pages import write_kv
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

    def forward(self, x_TD: Tensor, context: AttentionContext) -> Tensor:
        qkv_TN = self.qkv_proj(x_TD)
        attend = self._local if self.layer.is_local else self._global
        o_THK = attend(qkv_TN.view(len(x_TD), -1, self.shape.head_dim), context)
        out_TD: Tensor = self.o_proj(o_THK.flatten(1))
        return out_TD

    def _local(self, qkv_TNK: Tensor, ctx: AttentionContext) -> Tensor:
        batch, n, shape = ctx.batch, ctx.batch.num_decode_tokens, self.shape
        assert shape.window is not None
        pages = batch.local
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
            pages.slot_mapping_T,
            num_stored=n,
        )
        if k_TGK is not None and v_TGK is not None:
            ctx.fresh[self.layer.index] = (k_TGK, v_TGK)
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

    def _global(self, qkv_TNK: Tensor, ctx: AttentionContext) -> Tensor:
        batch, n, shape = ctx.batch, ctx.batch.num_decode_tokens, self.shape
        pages = batch.global_
        k_cache, v_cache = ctx.kv_cache.caches(self.layer.kv_layer)
        if self.layer.owns_kv:
            ctx.key_weights[self.layer.index] = self.k_norm.weight
        q_THC = rotate_and_store_global(
            qkv_TNK,
            self.qkv_shape,
            self.eps,
            self.q_norm.weight,
            ctx.key_weights[self.layer.kv_layer],
            *ctx.global_rotary,
            k_cache,
            v_cache,
            pages.slot_mapping_T,
            owns_kv=self.layer.owns_kv,
        )
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


def _joined(*parts: Tensor | None) -> Tensor:
    """Decodes before chunks, whichever there are."""
    found = [part for part in parts if part is not None]
    return found[0] if len(found) == 1 else torch.cat(found)
