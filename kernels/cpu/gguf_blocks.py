"""Blocks of GGUF's quantised formats as float32, or as the codes and scales of INT4.

    Q8_0              d                   32 bytes      w = d·q
    Q4_0, Q5_0        d       [h]         16 bytes      w = d·(q − 8), d·(q − 16)
    Q4_1, Q5_1        d  m    [h]         16 bytes      w = d·q + m
    Q4_K, Q5_K        d  m    12 bytes    [h] 128 bytes w = (d·s)·q − m·t, a pair s, t per 32 values
    Q6_K              128 + 64 bytes  16 s    d         w = (d·s)·(q − 32), one s per 16 values

d and m are float16, h the fifth bits. A block is 32 values, of the last three formats 256. Every
product is exact in float32 but the last one of Q6_K, so that the results are bit for bit those of
`gguf.dequantize`, which is the specification.
"""

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numba import prange

from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import BF16, F16, F32, LANES, load, load_scalar, store, store_f32

GROUP = 32  # values of an INT4 group
_MANY_VALUES = 1 << 16  # below, starting threads takes longer than the work
Array = np.ndarray[Any, Any]


def dequantize(raw_NB: Array, kind: Kind) -> Array | None:
    """N×K float32 values of N rows of bytes, or None for a format that has no kernel here."""
    rows = len(raw_NB)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    values_NK = np.empty((rows, raw_NB.shape[1] // block_bytes * block_values), np.float32)
    threads = torch.get_num_threads() if values_NK.size >= _MANY_VALUES else 1
    if kind in _HALVES:
        addresses = raw_NB.ctypes.data, values_NK.ctypes.data
        _widen(_HALVES[kind], *addresses, values_NK.size, threads)
        return values_NK
    if kind not in _KERNELS:
        return None
    function, numbers = _KERNELS[kind]
    blocks = raw_NB.reshape(-1, block_bytes)
    function(blocks, values_NK.reshape(-1, block_values), *numbers, threads)
    return values_NK


def split_int4(raw_NB: Array, kind: Kind) -> tuple[Array, Array, Array] | None:
    """codes_NK (uint8, 0 to 15) and per group of 32 scale_NG and min_NG in float32, so that
    w = scale·code − min without rounding; None for a format that isn't made so."""
    if kind not in _SPLITS:
        return None
    function, numbers = _SPLITS[kind]
    rows = len(raw_NB)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = raw_NB.shape[1] // block_bytes * block_values
    codes_NK = np.empty((rows, columns), np.uint8)
    scale_NG, min_NG = (np.empty((rows, columns // GROUP), np.float32) for _ in range(2))
    groups = block_values // GROUP
    threads = torch.get_num_threads() if codes_NK.size >= _MANY_VALUES else 1
    function(
        raw_NB.reshape(-1, block_bytes),
        codes_NK.reshape(-1, block_values),
        scale_NG.reshape(-1, groups),
        min_NG.reshape(-1, groups),
        *numbers,
        threads,
    )
    return codes_NK, scale_NG, min_NG


@kernel
def _widen(element, source, target, num_values, threads):
    whole = num_values // LANES
    for thread in prange(threads):
        for i in range(whole * thread // threads, whole * (thread + 1) // threads):
            store(F32, target + i * LANES * 4, load(element, source + i * LANES * 2))
    for i in range(whole * LANES, num_values):
        store_f32(target + i * 4, load_scalar(element, source + i * 2))


@kernel
def _q8_0(blocks, values, threads):
    address = blocks.ctypes.data
    for thread in prange(threads):
        for i in range(len(blocks) * thread // threads, len(blocks) * (thread + 1) // threads):
            d = load_scalar(F16, address + i * 34)
            for j in range(32):
                values[i, j] = d * np.float32(np.int8(blocks[i, 2 + j]))


@kernel
def _small(blocks, values, zero, has_min, has_fifth, threads):
    address, num_bytes = blocks.ctypes.data, blocks.shape[1]
    for thread in prange(threads):
        for i in range(len(blocks) * thread // threads, len(blocks) * (thread + 1) // threads):
            d = load_scalar(F16, address + i * num_bytes)
            m = np.float32(-0.0)  # which keeps the sign of a zero
            if has_min:
                m = load_scalar(F16, address + i * num_bytes + 2)
            fifths = np.uint32(0)
            if has_fifth:
                for j in range(4):
                    fifths |= np.uint32(blocks[i, num_bytes - 20 + j]) << np.uint32(8 * j)
            for j in range(16):
                byte = np.uint32(blocks[i, num_bytes - 16 + j])
                low = _with_fifth(byte & np.uint32(15), fifths, j)
                high = _with_fifth(byte >> np.uint32(4), fifths, j + 16)
                values[i, j] = d * np.float32(low - zero) + m
                values[i, 16 + j] = d * np.float32(high - zero) + m


@device
def _with_fifth(code, fifths, j):
    """Four bits, and bit j of `fifths` above them."""
    return np.int32(code | (fifths >> np.uint32(j) & np.uint32(1)) << np.uint32(4))


@device
def _scale_and_min(packed, group):
    """The six bits of scale and minimum number `group` of eight, in 12 bytes."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    both = packed[group + 4]
    return both & 15 | packed[group - 4] >> 2 & 48, both >> 4 | packed[group] >> 2 & 48


@kernel
def _k(blocks, values, has_fifth, threads):
    address, num_bytes = blocks.ctypes.data, blocks.shape[1]
    for thread in prange(threads):
        for i in range(len(blocks) * thread // threads, len(blocks) * (thread + 1) // threads):
            d = load_scalar(F16, address + i * num_bytes)
            m = load_scalar(F16, address + i * num_bytes + 2)
            for group in range(8):
                scale, minimum = _scale_and_min(blocks[i, 4:16], group)
                ds, mt = d * np.float32(scale), m * np.float32(minimum)
                first, shift = num_bytes - 128 + group // 2 * 32, np.uint8(group % 2 * 4)
                fifth = np.uint8(has_fifth)
                for j in range(32):
                    q = (blocks[i, first + j] >> shift) & np.uint8(15)
                    q |= (blocks[i, 16 + j] >> np.uint8(group) & fifth) << np.uint8(4)
                    values[i, group * 32 + j] = ds * np.float32(q) - mt


@kernel
def _q6_k(blocks, values, threads):
    address = blocks.ctypes.data
    for thread in prange(threads):
        for i in range(len(blocks) * thread // threads, len(blocks) * (thread + 1) // threads):
            d = load_scalar(F16, address + i * 210 + 208)
            for group in range(16):
                ds = d * np.float32(np.int8(blocks[i, 192 + group]))
                half, quarter, side = group // 8, group % 8 // 2, group % 2 * 16
                first = half * 64 + quarter % 2 * 32 + side
                shift, shift_high = np.uint8(quarter // 2 * 4), np.uint8(quarter * 2)
                for j in range(16):
                    q = (blocks[i, first + j] >> shift) & np.uint8(15)
                    high = blocks[i, 128 + half * 32 + side + j] >> shift_high & np.uint8(3)
                    q |= high << np.uint8(4)
                    values[i, group * 16 + j] = ds * np.float32(np.int32(q) - 32)


@kernel
def _split_small(blocks, codes, scale, minimum, has_min, threads):
    address, num_bytes = blocks.ctypes.data, blocks.shape[1]
    for thread in prange(threads):
        for i in range(len(blocks) * thread // threads, len(blocks) * (thread + 1) // threads):
            d = load_scalar(F16, address + i * num_bytes)
            scale[i, 0] = d
            minimum[i, 0] = np.float32(8) * d
            if has_min:
                minimum[i, 0] = -load_scalar(F16, address + i * num_bytes + 2)
            for j in range(16):
                byte = blocks[i, num_bytes - 16 + j]
                codes[i, j] = byte & np.uint8(15)
                codes[i, 16 + j] = byte >> np.uint8(4)


@kernel
def _split_q4_k(blocks, codes, scale, minimum, threads):
    address = blocks.ctypes.data
    for thread in prange(threads):
        for i in range(len(blocks) * thread // threads, len(blocks) * (thread + 1) // threads):
            d = load_scalar(F16, address + i * 144)
            m = load_scalar(F16, address + i * 144 + 2)
            for group in range(8):
                s, t = _scale_and_min(blocks[i, 4:16], group)
                scale[i, group], minimum[i, group] = d * np.float32(s), m * np.float32(t)
                first, shift = 16 + group // 2 * 32, np.uint8(group % 2 * 4)
                for j in range(32):
                    codes[i, group * 32 + j] = (blocks[i, first + j] >> shift) & np.uint8(15)


_HALVES = {Kind.F16: F16, Kind.BF16: BF16}
_KERNELS: dict[Kind, tuple[Callable[..., None], tuple[Any, ...]]] = {
    Kind.Q8_0: (_q8_0, ()),
    Kind.Q4_0: (_small, (8, False, False)),
    Kind.Q4_1: (_small, (0, True, False)),
    Kind.Q5_0: (_small, (16, False, True)),
    Kind.Q5_1: (_small, (0, True, True)),
    Kind.Q4_K: (_k, (False,)),
    Kind.Q5_K: (_k, (True,)),
    Kind.Q6_K: (_q6_k, ()),
}
_SPLITS: dict[Kind, tuple[Callable[..., None], tuple[Any, ...]]] = {
    Kind.Q4_0: (_split_small, (False,)),
    Kind.Q4_1: (_split_small, (True,)),
    Kind.Q4_K: (_split_q4_k, ()),
}
