"""Root-mean-square norm over the last dimension.

    y = x / sqrt(mean(x²) + eps) · w

x_*D any float dtype, w_D float32 or None (no weight) → y_*D in x's dtype; computed in float32.
Gemma 3 checkpoints hold w − 1; whoever loads them adds the one.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x_float = x.float()
    y = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype)
