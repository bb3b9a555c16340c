"""What Gemma 3 and Gemma 4 decoders have in common: embeddings, layers, final norm, output head.

Parameter names are those of transformers' text models without the `model.` prefix, with q/k/v and
gate/up fused. T tokens   D model width   V vocabulary   N rows that are wanted
"""

from typing import cast

import torch
from torch import Tensor, nn

from bezel.engine.batch import Batch
from bezel.engine.kv_cache import KVCache
from bezel.engine.layers.attention import Attention, AttentionContext
from bezel.engine.layers.embedding import ScaledEmbedding
from bezel.engine.layers.linear import Linear
from bezel.engine.layers.norm import RMSNorm
from bezel.engine.model_config import AttentionConfig, ModelConfig
from bezel.kernels.cpu.linear import Scratch
from bezel.kernels.embedding import embed_and_norm
from bezel.kernels.linear import linear
from bezel.kernels.logits import softcap
from bezel.kernels.packed import PackedWeight
from bezel.kernels.rotary import rotary_frequencies, rotary_table


class Decoder(nn.Module):
    """Base of the two families, which add their `layers` and what feeds them."""

    layers: nn.ModuleList

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self._logits = Scratch()
        scale = config.hidden_size**0.5
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, scale, dtype)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype)

    def after_loading(self) -> None:
        """Compute what follows from the weights and the configuration, on the weights' device."""
        device = self.norm.weight.device
        self.local_frequencies = _frequencies(self.config.local, device)
        self.global_frequencies = _frequencies(self.config.global_, device)

    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Hidden states after the final norm, T×D.

        Once the last layer that owns keys and values has stored them, only rows that the batch
        wants go on; what is returned of the others has no meaning.
        """
        context, wanted = self.attention_context(batch, kv_cache), batch.wanted
        x_TD, normed_TD = self.embed(batch.token_ids_T)
        per_layer_TLE = self.per_layer_inputs(batch.token_ids_T, x_TD)
        all_TD, last_owner = normed_TD, max(x.index for x in self.config.layers if x.owns_kv)
        for i, (layer, next_norm_D) in enumerate(zip(self.layers, self.next_norms(), strict=True)):
            q_THK = cast(Attention, layer.self_attn).store(normed_TD, context)
            if wanted is not None and i == last_owner:
                all_TD, rows_N, context = normed_TD, wanted.rows_N, context.narrowed(wanted)
                if len(rows_N) == 0:
                    return all_TD
                q_THK, x_TD = q_THK[rows_N], x_TD[rows_N]
                per_layer_TLE = None if per_layer_TLE is None else per_layer_TLE[rows_N]
            per_layer_TE = None if per_layer_TLE is None else per_layer_TLE[:, i]
            x_TD, normed_TD = layer(x_TD, q_THK, per_layer_TE, next_norm_D, context)
        return normed_TD if wanted is None else all_TD.index_copy_(0, wanted.rows_N, normed_TD)

    def per_layer_inputs(self, token_ids_T: Tensor, x_TD: Tensor) -> Tensor | None:
        """T×L×E: what each layer gets besides the residual stream, if the model has that."""
        return None

    def compute_logits(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV in float32, softcapped where the model has a cap; `hidden_ND` is normed.

        On a CPU they stay until the next call.
        """
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        is_packed = isinstance(head.weight, PackedWeight)
        dtype = torch.float32 if is_packed else None
        logits_NV = linear(hidden_ND, head.weight, dtype, self._logits)
        return softcap(logits_NV, self.config.final_logit_softcapping).float()

    def embed(self, token_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings x_TD and their norm for the first layer."""
        first, table = self._input_norms[0], self.embed_tokens
        if isinstance(table.weight, PackedWeight):
            x_TD = table(token_ids_T)
            return x_TD, first(x_TD)
        return embed_and_norm(token_ids_T, table.weight, table.scale, first.weight, first.eps)

    def next_norms(self) -> list[Tensor]:
        """For each layer the weight of the norm that follows it: each norm is computed together
        with the sum that it reads."""
        return [*(norm.weight for norm in self._input_norms[1:]), self.norm.weight]

    @property
    def _input_norms(self) -> list[RMSNorm]:
        return [cast(RMSNorm, layer.input_layernorm) for layer in self.layers]

    def attention_context(self, batch: Batch, kv_cache: KVCache) -> AttentionContext:
        """The step's shared attention inputs, RoPE tables included."""
        return AttentionContext(
            batch,
            kv_cache,
            local_rotary=rotary_table(batch.positions_T, self.local_frequencies),
            global_rotary=rotary_table(batch.positions_T, self.global_frequencies),
        )

    def is_ignorable(self, name: str) -> bool:
        """Whether a checkpoint tensor may be left unused: the tied head, K/V of sharing layers."""
        if name == "lm_head.weight":
            return self.config.tie_word_embeddings
        return any(
            name.startswith(f"layers.{layer.index}.self_attn.{part}")
            for layer in self.config.layers
            if not layer.owns_kv
            for part in ("k_proj.", "v_proj.", "k_norm.")
        )

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        """A checkpoint tensor as this model keeps it."""
        return tensor


def _frequencies(attention: AttentionConfig, device: torch.device) -> Tensor:
    rotary = attention.rotary
    return rotary_frequencies(
        rotary.theta, attention.head_dim, rotary.num_frequencies, rotary.factor
    ).to(device)
