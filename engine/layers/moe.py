"""Gemma 4's routed experts beside the dense MLP of a layer.

The residual y is normed three ways in one pass: for the dense MLP, for the experts, and for the
router, which reads rms(y) · scale · D^-½. Then

    routed = Σ_j w_j · expert_j(norm_2(y))            dense = mlp(norm_1(y))
    y' = (y + post_norm(post_norm_1(dense) + post_norm_2(routed))) · scalar

T tokens   D model width   E experts   A experts per token   F expert width
"""

import torch
from torch import Tensor, nn

from bezel.engine.layers.linear import Linear
from bezel.engine.layers.mlp import GatedMLP
from bezel.engine.model_config import MoEConfig
from bezel.kernels.jit import runs_triton
from bezel.kernels.moe_mlp import MAX_DENSE_TOKENS, moe_mlp
from bezel.kernels.moe_route import route
from bezel.kernels.packed import PackedWeight
from bezel.kernels.packed_moe import packed_moe_mlp


class Router(nn.Module):
    """Scores of the experts; the norm in front of it is computed together with the others."""

    def __init__(self, hidden_size: int, moe: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.scale = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.per_expert_scale = nn.Parameter(torch.empty(moe.num_experts, dtype=dtype))
        self.proj = Linear(hidden_size, moe.num_experts, dtype)

    @property
    def norm_weight_D(self) -> Tensor:
        """Float32 weight of the norm whose result `forward` takes."""
        weight_D: Tensor = self.scale.data.float() * len(self.scale) ** -0.5
        return weight_D

    def forward(self, normed_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids chosen_TA and their weights_TA."""
        return route(self.proj(normed_TD), self.per_expert_scale, self.top_k)


class Experts(nn.Module):
    """gate_up_proj E×2F×D (gate first) and down_proj E×D×F, as checkpoints store them.

    The loader may put packed weights in the parameters' places.
    """

    gate_up_proj: Tensor | PackedWeight
    down_proj: Tensor | PackedWeight

    def __init__(self, hidden_size: int, moe: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        num, self.width = moe.num_experts, moe.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * self.width, hidden_size, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num, hidden_size, self.width, dtype=dtype))

    def forward(
        self, routed_TD: Tensor, dense_TD: Tensor, chosen_TA: Tensor, mlp: GatedMLP
    ) -> tuple[Tensor, Tensor | None]:
        """Unweighted rows y_TXD, one per chosen expert, and the dense MLP's output.

        Where the dense MLP takes part in the experts' launch its parts are further rows of y_TXD.
        """
        gate_up, down = self.gate_up_proj, self.down_proj
        if isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight):
            return packed_moe_mlp(routed_TD, chosen_TA, gate_up, down), mlp(dense_TD)
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        weights = (gate_up, down)
        if self._takes(mlp, routed_TD):
            dense_gate_up, dense_down = mlp.gate_up_proj.weight, mlp.down_proj.weight
            assert isinstance(dense_gate_up, Tensor) and isinstance(dense_down, Tensor)
            dense = (dense_gate_up, dense_down)
            return moe_mlp(routed_TD, dense_TD, chosen_TA, *weights, *dense), None
        return moe_mlp(routed_TD, None, chosen_TA, *weights, None, None), mlp(dense_TD)

    def _takes(self, mlp: GatedMLP, x_TD: Tensor) -> bool:
        """The dense MLP is as wide as a whole number of experts, and the step is small."""
        is_multiple = mlp.down_proj.in_features % self.width == 0
        return runs_triton(x_TD) and is_multiple and len(x_TD) <= MAX_DENSE_TOKENS
