"""Gemma 4 text decoder: every layer ends in a scalar; some models add per-layer embeddings, some
routed experts beside the MLP.

T tokens   D model width   L layers   E per-layer embedding width
"""

from typing import cast

import torch
from torch import Tensor, nn

from bezel.engine.layers.attention import Attention, AttentionContext
from bezel.engine.layers.embedding import ScaledEmbedding
from bezel.engine.layers.linear import Linear
from bezel.engine.layers.mlp import GatedMLP
from bezel.engine.layers.moe import Experts, Router
from bezel.engine.layers.norm import RMSNorm
from bezel.engine.model_config import LayerConfig, ModelConfig
from bezel.engine.models.decoder import Decoder
from bezel.kernels.gelu_mul import gelu_times
from bezel.kernels.moe_combine import combine_experts
from bezel.kernels.rms_norm import add_rms_norm


class Gemma4Layer(nn.Module):
    """Attention, MLP (with experts beside it), per-layer embedding, scalar."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.eps = eps
        self.self_attn = Attention(config, layer, dtype)
        self.mlp = GatedMLP(dim, layer.intermediate_size, dtype)
        self.input_layernorm = RMSNorm(dim, eps)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.pre_feedforward_layernorm = RMSNorm(dim, eps)
        self.post_feedforward_layernorm = RMSNorm(dim, eps)
        self.layer_scalar = nn.Parameter(torch.empty(1, dtype=dtype))
        self.has_experts = config.moe is not None
        if config.moe is not None:
            self.router = Router(dim, config.moe, dtype)
            self.experts = Experts(dim, config.moe, dtype)
            self.post_feedforward_layernorm_1 = RMSNorm(dim, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(dim, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(dim, eps)
        self.has_per_layer_input = config.per_layer_input_size > 0
        if config.per_layer_input_size:
            width = config.per_layer_input_size
            self.per_layer_input_gate = Linear(dim, width, dtype)
            self.per_layer_projection = Linear(width, dim, dtype)
            self.post_per_layer_input_norm = RMSNorm(dim, eps)

    def after_loading(self) -> None:
        """Stack the weights of the norms that read the residual between attention and MLP."""
        weights = [self.pre_feedforward_layernorm.weight.data]
        if self.has_experts:
            weights += [self.pre_feedforward_layernorm_2.weight.data, self.router.norm_weight_D]
        self.middle_norms_ND = torch.stack(weights)

    def forward(
        self,
        x_TD: Tensor,
        q_THK: Tensor,
        per_layer_TE: Tensor | None,
        next_norm_D: Tensor,
        context: AttentionContext,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and this layer's queries → the stream and its norm for the next."""
        attended = self.self_attn(q_THK, context)
        x_TD, normed_NTD = add_rms_norm(
            attended,
            self.post_attention_layernorm.weight,
            x_TD,
            self.eps,
            None,
            self.middle_norms_ND,
        )
        assert normed_NTD is not None
        last = (self.layer_scalar, next_norm_D)
        after_mlp = (None, None) if self.has_per_layer_input else last
        feed_forward = self._experts if self.has_experts else self._dense
        x_TD, next_TD = feed_forward(x_TD, normed_NTD, *after_mlp)
        if per_layer_TE is not None:
            gated_TE = gelu_times(self.per_layer_input_gate(x_TD), per_layer_TE)
            projected_TD = self.per_layer_projection(gated_TE)
            x_TD, next_TD = self.post_per_layer_input_norm.add(projected_TD, x_TD, *last)
        assert next_TD is not None
        return x_TD, next_TD

    def _dense(
        self,
        x_TD: Tensor,
        normed_NTD: Tensor,
        scalar_1: Tensor | None,
        next_norm_D: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        fed_TD = self.mlp(normed_NTD[0])
        return self.post_feedforward_layernorm.add(fed_TD, x_TD, scalar_1, next_norm_D)

    def _experts(
        self,
        x_TD: Tensor,
        normed_NTD: Tensor,
        scalar_1: Tensor | None,
        next_norm_D: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        chosen_TA, weights_TA = self.router(normed_NTD[2])
        y_TXD, dense_TD = self.experts(normed_NTD[1], normed_NTD[0], chosen_TA, self.mlp)
        return combine_experts(
            y_TXD,
            weights_TA,
            dense_TD,
            self.post_feedforward_layernorm_2.weight,
            self.post_feedforward_layernorm_1.weight,
            self.post_feedforward_layernorm.weight,
            x_TD,
            self.eps,
            scalar_1,
            next_norm_D,
        )


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
            self.per_layer_model_projection = Linear(config.hidden_size, total, dtype)
            # The projection is divided by √D, which the norm undoes but for its epsilon.
            eps = config.rms_norm_eps * config.hidden_size
            self.per_layer_projection_norm = RMSNorm(width, eps)

    def after_loading(self) -> None:
        super().after_loading()
        for layer in self.layers:
            cast(Gemma4Layer, layer).after_loading()
        device = self.norm.weight.device
        self.half_1 = torch.full((1,), 2.0**-0.5, dtype=torch.float32, device=device)

    def per_layer_inputs(self, token_ids_T: Tensor, x_TD: Tensor) -> Tensor | None:
        """(norm(project(x) · D^-½) + embed(ids) · E^½) · 2^-½, an E-vector per layer and token."""
        if not self.config.per_layer_input_size:
            return None
        width = self.config.per_layer_input_size
        projected = self.per_layer_model_projection(x_TD)
        mixed, _ = self.per_layer_projection_norm.add(
            projected.view(-1, width),
            self.embed_tokens_per_layer(token_ids_T).view(-1, width),
            self.half_1,
            None,
        )
        return mixed.view(len(x_TD), -1, width)
