"""Gemma 4's routed experts: a router on the raw residual, and the experts' stacked weights.

T tokens   D model width   E experts   F expert width
"""

import torch
from torch import Tensor, nn

from bezel.engine.model_config import MoEConfig
from bezel.kernels.moe import experts, route
from bezel.kernels.rms_norm import rms_norm


class Router(nn.Module):
    """Scores = proj(rms(x) · scale · D^-½); the norm has no weight of its own."""

    def __init__(self, hidden_size: int, moe: MoEConfig, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.top_k = eps, moe.top_k
        self.scalar = hidden_size**-0.5
        self.scale = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.per_expert_scale = nn.Parameter(torch.empty(moe.num_experts, dtype=dtype))
        self.proj = nn.Linear(hidden_size, moe.num_experts, bias=False, dtype=dtype)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        normed_TD = rms_norm(x_TD, None, self.eps) * self.scale * self.scalar
        return route(self.proj(normed_TD), self.per_expert_scale, self.top_k)


class Experts(nn.Module):
    """gate_up_proj E×2F×D (gate first) and down_proj E×D×F, as checkpoints store them."""

    def __init__(self, hidden_size: int, moe: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        num, width = moe.num_experts, moe.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden_size, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num, hidden_size, width, dtype=dtype))

    def forward(self, x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor) -> Tensor:
        return experts(x_TD, chosen_TA, weights_TA, self.gate_up_proj, self.down_proj)
