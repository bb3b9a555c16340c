"""What Gemma 3 and Gemma 4 decoders have in common: embeddings, layers, final norm, output head.

Parameter names are those of transformers' text models without the `model.` prefix, with q/k/v and
gate/up fused. T tokens   D model width   V vocabulary   N rows whose logits are wanted
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bezel.engine.batch import Batch
from bezel.engine.kv_cache import KVCache
from bezel.engine.layers.attention import AttentionContext
from bezel.engine.layers.embedding import ScaledEmbedding, softcap
from bezel.engine.layers.norm import RMSNorm
from bezel.engine.model_config import ModelConfig, RotaryConfig
from bezel.kernels.rotary import rotary_frequencies, rotary_table


class Decoder(nn.Module):
    """Base of the two families, which add their layers and what feeds them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        scale = config.hidden_size**0.5
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, scale, dtype)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def compute_logits(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV in float32, softcapped where the model has a cap."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits_NV = F.linear(self.norm(hidden_ND), head.weight).float()
        return softcap(logits_NV, self.config.final_logit_softcapping)

    def attention_context(self, batch: Batch, kv_cache: KVCache) -> AttentionContext:
        """The step's shared attention inputs, RoPE tables included."""
        return AttentionContext(
            batch,
            kv_cache,
            local_rotary=_table(
                batch.positions_T, self.config.local.rotary, self.config.local.head_dim
            ),
            global_rotary=_table(
                batch.positions_T, self.config.global_.rotary, self.config.global_.head_dim
            ),
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


def _table(positions_T: Tensor, rotary: RotaryConfig, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = rotary_frequencies(rotary.theta, head_dim, rotary.num_frequencies, rotary.factor)
    return rotary_table(positions_T, frequencies.to(positions_T.device))
