"""The noise of `kernels.gumbel` on CPUs: its bits 16 at a time, its logarithms one at a time.

Noise rises with its bits. So bits say which of many tokens could have won, and few logarithms are
ever taken.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bezel.kernels.cpu.jit import device
from bezel.kernels.cpu.lanes import LANES, Tile

MAX_NOISE = np.float32(16.7)

_GOLDEN32 = 0x9E3779B1
_MIX32 = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

_INT_LANES = Tile(is_float=False)
_INTS = _INT_LANES.lanes


def _all(value: Any) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    low = builder.trunc(scalar, ir.IntType(32))
    undefined = ir.Constant(_INTS, ir.Undefined)
    first = builder.insert_element(undefined, low, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, _all(0))


def _mixed(builder: Any, bits: Any) -> Any:
    for shift, factor in _MIX32:
        bits = builder.xor(bits, builder.lshr(bits, _all(shift)))
        bits = builder.mul(bits, _all(factor))
    return bits


@intrinsic
def noise_bits(typing: Any, token: Any, key: Any) -> Any:
    """23 bits for each of 16 tokens from `token` on, as int lanes; token and key are int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, low = (_splat(builder, argument) for argument in arguments)
        high = _splat(builder, builder.lshr(arguments[1], ir.Constant(ir.IntType(64), 32)))
        tokens = builder.add(first, ir.Constant(_INTS, list(range(LANES))))
        bits = builder.add(builder.mul(tokens, _all(_GOLDEN32)), low)
        bits = _mixed(builder, builder.xor(_mixed(builder, bits), high))
        return builder.lshr(bits, _all(9))

    return _INT_LANES(token, key), generate


@intrinsic
def more_bits(typing: Any, left: Any, right: Any) -> Any:
    """The larger of two int lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_signed(">", *arguments), *arguments)

    return _INT_LANES(left, right), generate


@intrinsic
def most_bits(typing: Any, lanes: Any) -> Any:
    """The largest of int lanes, as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        reduced = builder.module.declare_intrinsic(
            "llvm.vector.reduce.smax.v16i32", fnty=ir.FunctionType(ir.IntType(32), [_INTS])
        )
        return builder.sext(builder.call(reduced, arguments), ir.IntType(64))

    return types.int64(lanes), generate


@intrinsic
def bits_of_lane(typing: Any, lanes: Any, lane: Any) -> Any:
    """One of int lanes, as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lane32 = builder.trunc(arguments[1], ir.IntType(32))
        return builder.sext(builder.extract_element(arguments[0], lane32), ir.IntType(64))

    return types.int64(lanes, lane), generate


@device
def noise_of_bits(bits):
    """Float32; each logarithm is rounded to float32, as torch does."""
    uniform = (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-23)
    inner = np.float32(math.log(np.float64(uniform)))
    return -np.float32(math.log(-np.float64(inner)))


@device
def noise_key(seed, position):
    """As `kernels.gumbel.noise_key`, of one row."""
    seed_bits = _mixed64(np.uint64(seed) * _GAMMA)
    return np.int64(_mixed64(seed_bits + np.uint64(position) * _GAMMA))


@device
def _mixed64(bits):
    bits = (bits ^ (bits >> np.uint64(30))) * _FACTOR_1
    bits = (bits ^ (bits >> np.uint64(27))) * _FACTOR_2
    return bits ^ (bits >> np.uint64(31))
