"""Gemma 4 text decoder: every layer ends in a scalar; some models add per-layer embeddings, some
routed experts beside the MLP.

T tokens   D model width   L layers   E per-layer embedding width
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bezel.engine.batch import Batch
from bezel.engine.kv_cache import KVCache
from bezel.engine.layers.attention import Attention, AttentionContext
from bezel.engine.layers.embedding import ScaledEmbedding
from bezel.engine.layers.mlp import GatedMLP
from bezel.engine.layers.moe import Experts, Router
from bezel.engine.layers.norm import RMSNorm
from bezel.engine.model_config import LayerConfig, ModelConfig
from bezel.engine.models.decoder import Decoder


class Gemma4Layer(nn.Module):
    """Attention, MLP (with experts beside it), per-layer embedding, scalar."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, dtype)
        self.mlp = GatedMLP(dim, layer.intermediate_size, dtype)
        self.input_layernorm = RMSNorm(dim, eps)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.pre_feedforward_layernorm = RMSNorm(dim, eps)
        self.post_feedforward_layernorm = RMSNorm(dim, eps)
        self.layer_scalar = nn.Parameter(torch.empty(1, dtype=dtype))
        self.has_experts = config.moe is not None
        if config.moe is not None:
            self.router = Router(dim, config.moe, eps, dtype)
            self.experts = Experts(dim, config.moe, dtype)
            self.post_feedforward_layernorm_1 = RMSNorm(dim, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(dim, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(dim, eps)
        if config.per_layer_input_size:
            width = config.per_layer_input_size
            self.per_layer_input_gate = nn.Linear(dim, width, bias=False, dtype=dtype)
            self.per_layer_projection = nn.Linear(width, dim, bias=False, dtype=dtype)
            self.post_per_layer_input_norm = RMSNorm(dim, eps)

    def forward(
        self, x_TD: Tensor, per_layer_TE: Tensor | None, context: AttentionContext
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_TD), context)
        x_TD = x_TD + self.post_attention_layernorm(attended)
        x_TD = x_TD + self.post_feedforward_layernorm(self._feed_forward(x_TD))
        if per_layer_TE is not None:
            gate_TE = F.gelu(self.per_layer_input_gate(x_TD), approximate="tanh")
            projected = self.per_layer_projection(gate_TE * per_layer_TE)
            x_TD = x_TD + self.post_per_layer_input_norm(projected)
        out_TD: Tensor = x_TD * self.layer_scalar
        return out_TD

    def _feed_forward(self, x_TD: Tensor) -> Tensor:
        dense_TD: Tensor = self.mlp(self.pre_feedforward_layernorm(x_TD))
        if not self.has_experts:
            return dense_TD
        # The router reads the residual itself: the norm in front of the experts is not its input.
        chosen, weights = self.router(x_TD)
        routed_TD = self.experts(self.pre_feedforward_layernorm_2(x_TD), chosen, weights)
        dense_TD = self.post_feedforward_layernorm_1(dense_TD)
        mixed_TD: Tensor = dense_TD + self.post_feedforward_layernorm_2(routed_TD)
        return mixed_TD


class Gemma4Decoder(Decoder):
    """All five Gemma 4 shapes."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.layers = nn.ModuleList(Gemma4Layer(config, layer, dtype) for layer in config.layers)
        if config.per_layer_input_size:
            width = config.per_layer_input_size
            total = len(config.layers) * width
            self.embed_tokens_per_layer = ScaledEmbedding(
                config.per_layer_vocab_size, total, width**0.5, dtype
            )
            self.per_layer_model_projection = nn.Linear(
                config.hidden_size, total, bias=False, dtype=dtype
            )
            self.per_layer_projection_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Hidden states x_TD before the final norm."""
        context = self.attention_context(batch, kv_cache)
        x_TD: Tensor = self.embed_tokens(batch.token_ids_T)
        per_layer_LTE = self._per_layer_inputs(batch.token_ids_T, x_TD)
        for layer, per_layer_TE in zip(self.layers, per_layer_LTE, strict=True):
            x_TD = layer(x_TD, per_layer_TE, context)
        return x_TD

    def _per_layer_inputs(
        self, token_ids_T: Tensor, x_TD: Tensor
    ) -> tuple[Tensor, ...] | list[None]:
        """(norm(project(x) · D^-½) + embed(ids) · E^½) · 2^-½, an E-vector per layer and token."""
        num_layers = len(self.config.layers)
        if not self.config.per_layer_input_size:
            return [None] * num_layers
        projected = self.per_layer_model_projection(x_TD) * self.config.hidden_size**-0.5
        projected = projected.view(len(x_TD), num_layers, -1)
        looked_up = self.embed_tokens_per_layer(token_ids_T).view_as(projected)
        mixed_TLE = (self.per_layer_projection_norm(projected) + looked_up) * 2.0**-0.5
        inputs: tuple[Tensor, ...] = mixed_TLE.unbind(1)
        return inputs
