"""A matrix product whose weight is a plain parameter or, on a CPU, packed for its kernels."""

import torch
from torch import Tensor, nn

from bezel.kernels.linear import linear
from bezel.kernels.packed import PackedWeight


class Linear(nn.Module):
    """y = x Wᵀ, W of out × in. The loader may put a PackedWeight in the parameter's place."""

    weight: Tensor | PackedWeight

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

    def forward(self, x_TK: Tensor) -> Tensor:
        return linear(x_TK, self.weight)
