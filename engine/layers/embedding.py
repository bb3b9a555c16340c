"""Token embedding times a constant; the output head may share its weight."""

import torch
from torch import Tensor, nn

from bezel.kernels.embedding import scaled_embedding
from bezel.kernels.linear import packed_embedding
from bezel.kernels.packed import PackedWeight


class ScaledEmbedding(nn.Module):
    """`scale · weight[ids]`, the scale rounded to the model's dtype, as Gemma was trained.

    The loader may put a PackedWeight in the parameter's place.
    """

    weight: Tensor | PackedWeight

    def __init__(self, num_embeddings: int, dim: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.scale = torch.tensor(scale, dtype=dtype, device="cpu").item()
        self.weight = nn.Parameter(torch.empty(num_embeddings, dim, dtype=dtype))

    def forward(self, token_ids_T: Tensor) -> Tensor:
        if isinstance(self.weight, PackedWeight):
            return packed_embedding(token_ids_T, self.weight, self.scale, self.dtype)
        return scaled_embedding(token_ids_T, self.weight, self.scale)
