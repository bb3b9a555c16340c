"""Gemma 3 text decoder: five local layers to one global, norms around both halves of a layer."""

import torch
from torch import Tensor, nn

from bezel.engine.batch import Batch
from bezel.engine.kv_cache import KVCache
from bezel.engine.layers.attention import Attention, AttentionContext
from bezel.engine.layers.mlp import GatedMLP
from bezel.engine.layers.norm import RMSNorm
from bezel.engine.model_config import LayerConfig, ModelConfig
from bezel.engine.models.decoder import Decoder


class Gemma3Layer(nn.Module):
    """x + norm(attention(norm(x))), then the same around the MLP."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, dtype)
        self.mlp = GatedMLP(dim, layer.intermediate_size, dtype)
        self.input_layernorm = RMSNorm(dim, eps)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.pre_feedforward_layernorm = RMSNorm(dim, eps)
        self.post_feedforward_layernorm = RMSNorm(dim, eps)

    def forward(self, x_TD: Tensor, context: AttentionContext) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_TD), context)
        x_TD = x_TD + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x_TD))
        out_TD: Tensor = x_TD + self.post_feedforward_layernorm(fed)
        return out_TD


class Gemma3Decoder(Decoder):
    """Gemma 3 checkpoints store norm weights as w − 1."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.layers = nn.ModuleList(Gemma3Layer(config, layer, dtype) for layer in config.layers)

    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Hidden states x_TD before the final norm."""
        context = self.attention_context(batch, kv_cache)
        x_TD: Tensor = self.embed_tokens(batch.token_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, context)
        return x_TD

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.float() + 1.0 if name.endswith("norm.weight") else tensor
