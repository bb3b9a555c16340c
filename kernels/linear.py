"""Products of activations with weights, plain or packed, and rows of packed tables.

    linear:            y[t, n] = Σ_k x[t, k] · w[n, k]
    packed_embedding:  y[t] = scale · w[token_ids[t]]

With INT8 and INT4 weights each 32 values of a row of x are rounded to int8 with a scale of their
own: `quantize_activations`. All else is exact integers, or float32. Sums of packed weights don't
depend on the number of rows.

T tokens   N outputs   K inputs
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.cpu.linear import Scratch, packed_embedding_cpu, packed_linear_cpu
from bezel.kernels.packed import GROUP, PackedWeight, WeightFormat, unpack_weight


def quantize_activations(x_TK: Tensor, format: WeightFormat) -> Tensor:
    """x as the product with weights of this format takes it, in float32."""
    if format is WeightFormat.BFLOAT16:
        return x_TK.float()
    parts = x_TK.float().unflatten(1, (-1, GROUP))
    factor = parts.abs().amax(2, keepdim=True) / 127
    codes = (parts * torch.where(factor > 0, 1 / factor, 0)).round_()
    rounded: Tensor = codes * factor
    return rounded.flatten(1)


def packed_linear_reference(x_TK: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return F.linear(quantize_activations(x_TK, weight.format), unpack_weight(weight)).to(dtype)


def linear(
    x_TK: Tensor,
    weight: Tensor | PackedWeight,
    dtype: torch.dtype | None = None,
    out: Scratch | None = None,
) -> Tensor:
    """y_TN in `dtype`, by default that of x; in the memory of `out` where that is given and of use.
    For packed weights x is bfloat16 or float32."""
    dtype = dtype or x_TK.dtype
    if isinstance(weight, Tensor):
        return F.linear(x_TK, weight).to(dtype)
    if runs_numba(x_TK, weight.num_inputs):
        return packed_linear_cpu(x_TK, weight, dtype, out)
    return packed_linear_reference(x_TK, weight, dtype)


def packed_embedding_reference(
    token_ids_T: Tensor, weight: PackedWeight, scale: float, dtype: torch.dtype
) -> Tensor:
    return (unpack_weight(weight)[token_ids_T].to(dtype) * scale).to(dtype)


def packed_embedding(
    token_ids_T: Tensor, weight: PackedWeight, scale: float, dtype: torch.dtype
) -> Tensor:
    """scale · w[token_ids] in `dtype`; values and products are rounded to it."""
    x_TK = torch.empty(len(token_ids_T), weight.num_inputs, dtype=dtype, device=token_ids_T.device)
    if runs_numba(x_TK, weight.num_inputs):
        packed_embedding_cpu(token_ids_T, weight, scale, x_TK)
        return x_TK
    return packed_embedding_reference(token_ids_T, weight, scale, dtype)
