"""The gated MLPs of the experts that each token chose, from packed weights: see moe_mlp.py.

The rows are sorted by expert, so that each expert's weights are read once for all its tokens.

T tokens   D model width   E experts   A experts per token   F expert width   R = T·A rows
"""

from torch import Tensor

from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.cpu.linear import packed_experts_cpu, rows_at_once
from bezel.kernels.cpu.moe import dispatch, scatter
from bezel.kernels.gelu_mul import gelu_mul
from bezel.kernels.linear import quantize_activations
from bezel.kernels.packed import PackedWeight, WeightFormat, unpack_weight


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
    row_bytes = x_TD.shape[1] * (x_TD.itemsize if gate_up.format is WeightFormat.BFLOAT16 else 1)
    order_R, blocks_M3 = dispatch(chosen_TA, len(gate_up.data), rows_at_once(row_bytes))
    gate_up_RF2 = packed_experts_cpu(x_TD, order_R, top_k, blocks_M3, gate_up)
    y_RD = packed_experts_cpu(gelu_mul(gate_up_RF2), None, top_k, blocks_M3, down)
    return scatter(y_RD, order_R).view(num_tokens, top_k, -1)
