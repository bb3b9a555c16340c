"""Gemma's attention over paged keys and values: local, global, and global with K = RoPE(w ⊙ V).

T tokens   S sequences   D model width   H query heads   G kv heads   K head width
J turned RoPE pairs   C values of a stored key row
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bezel.engine.batch import Batch
from bezel.engine.kv_cache import KVCache
from bezel.engine.layers.norm import RMSNorm
from bezel.engine.model_config import LayerConfig, ModelConfig
from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.kv_pages import write_kv
from bezel.kernels.prefill_attention import global_prefill_attention, local_prefill_attention
from bezel.kernels.rms_norm import rms_norm
from bezel.kernels.rotary import apply_rotary, turned_pairs

CosSin = tuple[Tensor, Tensor]


@dataclass(slots=True)
class AttentionContext:
    """What the layers of one step share.

    `fresh` keeps a local layer's new keys and values until the last layer that reads them is done;
    `key_weights` the k_norm weight of layers whose keys are stored without it.
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
        self.has_value_norm = model.family == "gemma4"
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
        self.qkv_proj = nn.Linear(model.hidden_size, num_rows, bias=False, dtype=dtype)
        self.o_proj = nn.Linear(q, model.hidden_size, bias=False, dtype=dtype)

    def forward(self, x_TD: Tensor, context: AttentionContext) -> Tensor:
        qkv_TN = self.qkv_proj(x_TD).view(len(x_TD), -1, self.shape.head_dim)
        num_heads, num_kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        q_THK = self.q_norm(qkv_TN[:, :num_heads])
        k_TGK = qkv_TN[:, num_heads : num_heads + num_kv_heads]
        v_TGK = k_TGK if self.shape.key_is_value else qkv_TN[:, num_heads + num_kv_heads :]
        if self.has_value_norm:
            v_TGK = rms_norm(v_TGK, None, self.eps)
        if self.layer.is_local:
            o_THK = self._local(q_THK, k_TGK, v_TGK, context)
        elif self.shape.key_is_value:
            o_THK = self._global_packed(q_THK, k_TGK, v_TGK, context)
        else:
            o_THK = self._global(q_THK, k_TGK, v_TGK, context)
        out_TD: Tensor = self.o_proj(o_THK.flatten(1))
        return out_TD

    def _local(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, ctx: AttentionContext) -> Tensor:
        batch, n, shape = ctx.batch, ctx.batch.num_decodes, self.shape
        pages = batch.local
        assert shape.window is not None
        k_cache, v_cache = ctx.kv_cache.caches(self.layer.kv_layer)
        assert v_cache is not None
        q_THK = apply_rotary(q_THK, *ctx.local_rotary)
        if self.layer.owns_kv:
            k_TGK = apply_rotary(self.k_norm(k_TGK), *ctx.local_rotary)
            ctx.fresh[self.layer.index] = (k_TGK, v_TGK)
            write_kv(k_TGK[:n], k_cache, pages.slot_mapping_T[:n])
            write_kv(v_TGK[:n], v_cache, pages.slot_mapping_T[:n])
        k_TGK, v_TGK = ctx.fresh[self.layer.kv_layer]
        decoded = decode_attention(
            q_THK[:n],
            k_cache,
            v_cache,
            pages.page_table_SP[:n],
            batch.seq_lens_S[:n],
            shape.scale,
            shape.window,
            shape.head_dim,
        )
        prefilled = local_prefill_attention(
            q_THK[n:],
            k_TGK[n:],
            v_TGK[n:],
            k_cache,
            v_cache,
            pages.page_table_SP[n:],
            batch.chunk_cu_seqlens_q,
            batch.chunk_seq_lens,
            shape.scale,
            shape.window,
        )
        if self.layer.index == self.last_reader:
            # Only now: a chunk's new pages may be the very pages that its first queries read.
            write_kv(k_TGK[n:], k_cache, pages.slot_mapping_T[n:])
            write_kv(v_TGK[n:], v_cache, pages.slot_mapping_T[n:])
            del ctx.fresh[self.layer.kv_layer]
        return torch.cat((decoded, prefilled))

    def _global(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, ctx: AttentionContext) -> Tensor:
        if self.layer.owns_kv:
            k_cache, v_cache = ctx.kv_cache.caches(self.layer.index)
            assert v_cache is not None
            slots = ctx.batch.global_.slot_mapping_T
            write_kv(apply_rotary(self.k_norm(k_TGK), *ctx.global_rotary), k_cache, slots)
            write_kv(v_TGK, v_cache, slots)
        return self._attend_pages(apply_rotary(q_THK, *ctx.global_rotary), ctx)

    def _global_packed(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, ctx: AttentionContext
    ) -> Tensor:
        """Keys are RoPE(w ⊙ V), so q · K = (q ⊙ w) · V on the pairs that RoPE leaves alone, plus
        the product of the turned pairs. A key row is [V | turned pairs of K]."""
        if self.layer.owns_kv:
            ctx.key_weights[self.layer.index] = self.k_norm.weight
            turned = turned_pairs(self.k_norm(k_TGK), *ctx.global_rotary)
            k_cache, _ = ctx.kv_cache.caches(self.layer.index)
            slots = ctx.batch.global_.slot_mapping_T
            write_kv(torch.cat((v_TGK, turned), dim=-1), k_cache, slots)
        num_pairs, half = self.shape.rotary.num_frequencies, self.shape.head_dim // 2
        folded = q_THK.float() * ctx.key_weights[self.layer.kv_layer]
        folded[..., :num_pairs] = 0
        folded[..., half : half + num_pairs] = 0
        turned_q = turned_pairs(q_THK, *ctx.global_rotary)
        return self._attend_pages(torch.cat((folded.to(q_THK.dtype), turned_q), dim=-1), ctx)

    def _attend_pages(self, q_THC: Tensor, ctx: AttentionContext) -> Tensor:
        batch, n, shape = ctx.batch, ctx.batch.num_decodes, self.shape
        k_cache, v_cache = ctx.kv_cache.caches(self.layer.kv_layer)
        tables = batch.global_.page_table_SP
        decoded = decode_attention(
            q_THC[:n],
            k_cache,
            v_cache,
            tables[:n],
            batch.seq_lens_S[:n],
            shape.scale,
            None,
            shape.head_dim,
        )
        prefilled = global_prefill_attention(
            q_THC[n:],
            k_cache,
            v_cache,
            tables[n:],
            batch.chunk_cu_seqlens_q,
            batch.chunk_seq_lens,
            shape.scale,
            shape.head_dim,
        )
        return torch.cat((decoded, prefilled))
