"""Gemma's gated MLP: down(gelu_tanh(gate(x)) · up(x)), gate and up as one product."""

import torch
from torch import Tensor, nn

from bezel.engine.layers.linear import Linear
from bezel.kernels.gelu_mul import gelu_mul


class GatedMLP(nn.Module):
    """D → F → D. `fused` tells the loader which rows of `gate_up_proj` a tensor fills."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        width = intermediate_size
        self.gate_up_proj = Linear(hidden_size, 2 * width, dtype)
        self.down_proj = Linear(width, hidden_size, dtype)
        self.fused = {
            "gate_proj": ("gate_up_proj", slice(0, width)),
            "up_proj": ("gate_up_proj", slice(width, 2 * width)),
        }

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD: Tensor = self.down_proj(gelu_mul(self.gate_up_proj(x_TD)))
        return out_TD
