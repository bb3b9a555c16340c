"""Routing tokens to experts, and the experts' gated MLPs.

    p = softmax(scores) over all E experts, in float32
    chosen = top-k of p;   w = p[chosen] / Σ p[chosen] · per_expert_scale[chosen]
    y[t] = Σ_j w[t, j] · down[e] · gelu_mul(gate_up[e] · x[t])          e = chosen[t, j]

T tokens   D model width   E experts   A experts per token   F expert width
x_TD   scores_TE   gate_up_EFD (gate first, then up)   down_EDF   → y_TD in x's dtype
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.gelu_mul import gelu_mul


def route(scores_TE: Tensor, per_expert_scale_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Expert ids chosen_TA (int64) and their weights_TA."""
    probabilities = torch.softmax(scores_TE, dim=-1, dtype=torch.float32)
    weights_TA, chosen_TA = probabilities.topk(top_k, dim=-1)
    weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
    return chosen_TA, weights_TA * per_expert_scale_E[chosen_TA]


def experts(
    x_TD: Tensor, chosen_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Weighted sum of the chosen experts, added up in order of expert id."""
    out_TD = torch.zeros_like(x_TD)
    for expert in torch.unique(chosen_TA).tolist():
        tokens, slot = (chosen_TA == expert).nonzero(as_tuple=True)
        hidden = gelu_mul(F.linear(x_TD[tokens], gate_up_EFD[expert]))
        y = F.linear(hidden, down_EDF[expert]) * weights_TA[tokens, slot, None]
        out_TD.index_add_(0, tokens, y.to(out_TD.dtype))
    return out_TD
