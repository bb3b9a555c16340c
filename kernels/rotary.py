"""Rotary position embedding of the first `J` pairs (j, j + K/2) of each head.

    y_j       = x_j · cos(p f_j) − x_{j+K/2} · sin(p f_j)
    y_{j+K/2} = x_{j+K/2} · cos(p f_j) + x_j · sin(p f_j)          f_j = theta^(−2j/K) / factor

Pairs from J on stay as they are: Gemma 4's global layers turn 64 of 256 pairs ("proportional"),
all others turn every pair. The exponent divides by the whole head width K either way.

Pairs are turned where they are normed and stored, in `qkv.py`; here are the tables, for any device,
and the reference.

T tokens   H heads   K head width   J turned pairs
"""

import torch
from torch import Tensor

from bezel.kernels.cpu import rotary as cpu
from bezel.kernels.cpu.jit import runs_numba


def rotary_frequencies(theta: float, head_dim: int, num_frequencies: int, factor: float) -> Tensor:
    """Frequencies f_J in float32."""
    exponents = torch.arange(0, 2 * num_frequencies, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents) / factor


def rotary_table_reference(positions_T: Tensor, frequencies_J: Tensor) -> tuple[Tensor, Tensor]:
    angles_TJ = positions_T[:, None].float() * frequencies_J
    return angles_TJ.cos(), angles_TJ.sin()


def rotary_table(positions_T: Tensor, frequencies_J: Tensor) -> tuple[Tensor, Tensor]:
    """cos_TJ and sin_TJ in float32, of positions (int64) and frequencies of one device."""
    if runs_numba(frequencies_J, frequencies_J.shape[0]):
        return cpu.rotary_table(positions_T, frequencies_J)
    return rotary_table_reference(positions_T, frequencies_J)


def turned_pairs(x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Only the turned values, first halves then second halves: THR with R = 2 J."""
    num_pairs, half = cos_TJ.shape[1], x_THK.shape[-1] // 2
    first = x_THK[..., :num_pairs].float()
    second = x_THK[..., half : half + num_pairs].float()
    cos, sin = cos_TJ[:, None], sin_TJ[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_THK.dtype)


def apply_rotary(x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """x_THK with its first J pairs turned, same dtype; the arithmetic is float32."""
    num_pairs, half = cos_TJ.shape[1], x_THK.shape[-1] // 2
    turned = turned_pairs(x_THK, cos_TJ, sin_TJ)
    if num_pairs == half:
        return turned
    return torch.cat(
        (
            turned[..., :num_pairs],
            x_THK[..., num_pairs:half],
            turned[..., num_pairs:],
            x_THK[..., half + num_pairs :],
        ),
        dim=-1,
    )
