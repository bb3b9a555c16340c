"""Gemma 3 text decoder: five local layers to one global, norms around both halves of a layer."""

import torch
from torch import Tensor, nn

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

    def forward(
        self,
        x_TD: Tensor,
        q_THK: Tensor,
        per_layer_TE: None,
        next_norm_D: Tensor,
        context: AttentionContext,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and this layer's queries → the stream and its norm for the next."""
        attended = self.self_attn(q_THK, context)
        x_TD, normed = self.post_attention_layernorm.add(
            attended, x_TD, None, self.pre_feedforward_layernorm.weight
        )
        x_TD, normed = self.post_feedforward_layernorm.add(
            self.mlp(normed), x_TD, None, next_norm_D
        )
        assert normed is not None
        return x_TD, normed


class Gemma3Decoder(Decoder):
    """Gemma 3 checkpoints store norm weights as w − 1."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.layers = nn.ModuleList(Gemma3Layer(config, layer, dtype) for layer in config.layers)

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.float() + 1.0 if name.endswith("norm.weight") else tensor
