"""Gumbel noise as a pure function of (seed, position, token id).

    key = mix64(mix64(seed) + position)          of a row, once, on the host
    u = mix32(mix32(token id, low half of key), high half of key),  a number between 0 and 1
    noise = −ln(−ln u)

seed, position, key int64; token ids any integers below 2³¹; noise float32. The largest of
x[i] + noise[i] is token i with probability softmax(x)[i] (Gumbel 1954), and since nothing else
goes into the noise, a draw doesn't depend on other rows or on what was drawn before.
"""

import torch
from torch import Tensor

from bezel.kernels.jit import tl, triton

NOISE_RANGE = 19.5  # more than the largest possible noise, 16.64, minus the smallest, −2.82

# SplitMix64 (Steele, Lea, Flood 2014) for the key of a row, MurmurHash3's 32-bit finaliser
# (Appleby 2011) for its 262,144 tokens, where 64-bit products would cost twice as much.
# All as signed numbers: torch has no unsigned arithmetic.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX64 = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_MIX32 = ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32), (16, 1))
_GOLDEN32 = 0x9E3779B1 - 2**32


def noise_key(seed_S: Tensor, position_S: Tensor) -> Tensor:
    """What a row's noise is made of, in 64 bits (int64, S)."""
    return _mix(_mix(seed_S * _GAMMA, _MIX64) + position_S * _GAMMA, _MIX64)


def gumbel(key_S: Tensor, token_ids_SC: Tensor) -> Tensor:
    """Standard Gumbel noise of each row's tokens: float32, S×C."""
    low_S, high_S = key_S.to(torch.int32), _shift_right(key_S, 32).to(torch.int32)
    bits = _mix(token_ids_SC.to(torch.int32) * _GOLDEN32 + low_S[:, None], _MIX32)
    bits = _mix(bits ^ high_S[:, None], _MIX32)
    # 23 bits and a half: exact in float32, and never 0 or 1, where a logarithm would be infinite.
    uniform = (_shift_right(bits, 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


@triton.jit
def gumbel_tile(key, b_token):
    """`gumbel` of one row: an int64 key, a tile of token ids."""
    b_bits = _mix_tile(b_token.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32))
    b_bits = _mix_tile(b_bits ^ (key >> 32).to(tl.uint32))
    b_uniform = ((b_bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(b_uniform))


@triton.jit
def _mix_tile(b_bits):
    b_bits = (b_bits ^ (b_bits >> 16)) * 0x85EBCA6B
    b_bits = (b_bits ^ (b_bits >> 13)) * 0xC2B2AE35
    return b_bits ^ (b_bits >> 16)


def _mix(x: Tensor, rounds: tuple[tuple[int, int], ...]) -> Tensor:
    for shift, factor in rounds:
        x = (x ^ _shift_right(x, shift)) * factor
    return x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; `>>` alone would drag the sign along."""
    width = torch.iinfo(x.dtype).bits
    return (x >> bits) & ((1 << (width - bits)) - 1)
