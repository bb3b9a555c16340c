"""RMSNorm with its weight kept in float32 whatever the model's dtype."""

import torch
from torch import Tensor, nn

from bezel.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Multiplies by `weight` itself, not 1 + weight; see `models/gemma3.py` for Gemma 3."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)
