"""The gated MLPs of the experts that each token chose, from packed weights: see moe_mlp.py.

The rows are sorted by expert, so that each expert's weights are read once for all its tokens.

T tokens   D model width   E experts   A experts per token   F expert width   R = T·A rows
"""

import torch
from torch import Tensor

from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.cpu.linear import packed_groups_cpu
from bezel.kernels.gelu_mul import gelu_mul
from bezel.kernels.linear import quantize_activations
from bezel.kernels.packed import PackedWeight, unpack_weight


def packed_moe_mlp_reference(
    x_TD: Tensor, chosen_TA: Tensor, gate_up: PackedWeight, down: PackedWeight
) -> Tensor:
    """Products of rounded activations, expert by expert."""
    num_tokens, top_k = chosen_TA.shape
    y_TAD = x_TD.new_empty(num_tokens, top_k, x_TD.shape[1])
    rows_TD = quantize_activations(x_TD, gate_up.format)
    for t in range(num_tokens):
        for a, expert in enumerate(chosen_TA[t].tolist()):
            hidden = (unpack_weight(gate_up[expert]) @ rows_TD[t]).to(x_TD.dtype)
            rounded_1F = quantize_activations(gelu_mul(hidden[None]), down.format)
            y_TAD[t, a] = unpack_weight(down[expert]) @ rounded_1F[0]
    return y_TAD


def packed_moe_mlp(
    x_TD: Tensor, chosen_TA: Tensor, gate_up: PackedWeight, down: PackedWeight
) -> Tensor:
    """Unweighted rows y_TAD in x's dtype; the weights are stacks, gate first in `gate_up`."""
    if not runs_numba(x_TD, gate_up.num_inputs, down.num_inputs):
        return packed_moe_mlp_reference(x_TD, chosen_TA, gate_up, down)
    num_tokens, top_k = chosen_TA.shape
    experts_R, slots_R = chosen_TA.flatten().long().sort(stable=True)
    chosen_M, counts_M = experts_R.unique_consecutive(return_counts=True)
    ends_M = counts_M.cumsum(0)
    groups_M3 = torch.stack((chosen_M, ends_M - counts_M, ends_M), dim=1)
    rows_R = torch.arange(len(slots_R))
    gate_up_RF2 = packed_groups_cpu(x_TD, slots_R // top_k, groups_M3, gate_up, x_TD.dtype)
    y_RD = packed_groups_cpu(gelu_mul(gate_up_RF2), rows_R, groups_M3, down, x_TD.dtype)
    y_TAD = torch.empty_like(y_RD)
    y_TAD[slots_R] = y_RD
    return y_TAD.view(num_tokens, top_k, -1)
