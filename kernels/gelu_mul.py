"""Gated GELU of Gemma's MLPs:  y = gelu_tanh(gate) · up.

gate_up_TF holds the gate in its first half, up in the second; y has half the width, same dtype.
"""

from torch import Tensor
from torch.nn import functional as F


def gelu_mul(gate_up_TF: Tensor) -> Tensor:
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up
