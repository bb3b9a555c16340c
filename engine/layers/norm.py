"""RMSNorm with its weight kept in float32 whatever the model's dtype."""

import torch
from torch import Tensor, nn

from bezel.kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Multiplies by `weight` itself, not 1 + weight; see `models/gemma3.py` for Gemma 3."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        scalar_1: Tensor | None,
        next_norm_D: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """y = (residual + norm(x)) · scalar, and y normed with `next_norm_D`."""
        next_norm_1D = None if next_norm_D is None else next_norm_D[None]
        y_TD, normed_1TD = add_rms_norm(
            x_TD, self.weight, residual_TD, self.eps, scalar_1, next_norm_1D
        )
        return y_TD, None if normed_1TD is None else normed_1TD[0]
