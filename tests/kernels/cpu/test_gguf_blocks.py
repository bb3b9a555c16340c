"""Dequantised blocks against the `gguf` package, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from bezel.kernels.cpu import gguf_blocks
from bezel.kernels.cpu.gguf_blocks import dequantize, split_int4

# Where the float16 numbers of a block stand.
HALVES = {
    Kind.Q8_0: (0,),
    Kind.Q4_0: (0,),
    Kind.Q5_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_1: (0, 2),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no number of blocks here can be divided by."""
    monkeypatch.setattr(gguf_blocks, "_MANY_VALUES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


def any_bytes(kind: Kind, rows: int, blocks: int) -> np.ndarray:
    """Every bit random, but that no float16 is infinite or NaN."""
    raw = np.random.default_rng(1).integers(
        0, 256, (rows, blocks * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8
    )
    for first in HALVES[kind]:
        raw.reshape(rows * blocks, -1)[:, first + 1] &= 0b1011_1111
    return raw


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and np.array_equal(left.view(np.int32), right.view(np.int32))


@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_all_bits_are_those_of_the_gguf_package(kind: Kind) -> None:
    raw = any_bytes(kind, rows=5, blocks=4)
    values = dequantize(raw, kind)
    assert values is not None
    assert same_bits(values, gguf.dequantize(raw, kind))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16], ids=str)
def test_halves_of_every_value_are_widened(kind: Kind) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    exponent = 0x7C00 if kind == Kind.F16 else 0x7F80
    finite = bits[(bits & exponent) != exponent][:-3]  # not whole lanes
    raw = finite.view(np.uint8).reshape(1, -1)
    values = dequantize(raw, kind)
    assert values is not None
    assert same_bits(values, gguf.dequantize(raw, kind))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K], ids=str)
def test_codes_scales_and_minima_are_the_same_weights(kind: Kind) -> None:
    raw = any_bytes(kind, rows=5, blocks=4)
    parts = split_int4(raw, kind)
    assert parts is not None
    codes_NK, scale_NG, min_NG = parts
    assert codes_NK.dtype == np.uint8 and codes_NK.max() == 15
    weights = np.repeat(scale_NG, 32, axis=1) * codes_NK - np.repeat(min_NG, 32, axis=1)
    assert np.array_equal(weights, gguf.dequantize(raw, kind))


def test_other_formats_are_left_to_the_gguf_package() -> None:
    assert dequantize(np.zeros((1, 84), np.uint8), Kind.Q2_K) is None
    assert dequantize(np.zeros((1, 4), np.uint8), Kind.F32) is None
    assert split_int4(np.zeros((1, 34), np.uint8), Kind.Q8_0) is None
