"""The largest logits of a row on CPUs, without sorting it, for sampling and log-probabilities.

Tokens are ordered as in `kernels.candidates`, by falling logit and rising token id, and have keys
that rise with that order. NaN is passed over as if it were −∞.

    logits of a row   [ block 0: 16 × 16 | block 1 | … ]   read once, by chunks of 64 blocks
    maxima            columns: 16 of each block, one of each lane
                      blocks:  one of each, the maximum of its columns

The k-th largest of many maxima is a lower bound of the k-th largest logit. Only blocks whose
maximum reaches it are looked at again, and the few logits listed there narrowed down to k.
How the row is divided doesn't depend on threads or on other rows, so no result does.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import (
    BF16,
    F32,
    LANES,
    Tile,
    lane_max,
    load,
    load_scalar,
    splat,
    store,
)

Array = npt.NDArray[Any]

BLOCK = 256  # logits: 16 vectors, so that a block's columns are as many as its rows
CHUNK_BLOCKS = 64  # what a thread takes at a time

_LANES = Tile(is_float=True)
_NO_LESS_THAN = np.float32(-3.4028234663852886e38)  # −∞ is never listed, and may be very frequent


@intrinsic
def larger(typing: Any, lanes: Any, than: Any) -> Any:
    """The larger of two float lanes; the second where the first is NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return _LANES(lanes, than), generate


@intrinsic
def at_least(typing: Any, lanes: Any, floor: Any) -> Any:
    """Bit i of an int64 says whether lane i is not below that of `floor`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = builder.fcmp_ordered(">=", *arguments)
        bits = builder.bitcast(flags, ir.IntType(LANES))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(lanes, floor), generate


@device
def num_blocks_of(num_vectors):
    return (num_vectors + LANES - 1) // LANES


@device
def num_chunks_of(num_vectors):
    return (num_blocks_of(num_vectors) + CHUNK_BLOCKS - 1) // CHUNK_BLOCKS


@device
def rank_key(value, token):
    """An int64 of a logit that isn't NaN."""
    bits = np.int64(np.float32(value + np.float32(0)).view(np.int32))  # −0 becomes 0
    rising = bits ^ 0x7FFFFFFF if bits < 0 else bits
    return (rising << 24) + (0xFFFFFF - token)


@device
def key_value(key):
    rising = key >> 24
    return np.int32(rising ^ 0x7FFFFFFF if rising < 0 else rising).view(np.float32)


@device
def key_token(key):
    return 0xFFFFFF - (key & 0xFFFFFF)


@kernel
def find_maxima(element, size, logits, stride, num_vectors, maxima, threads):
    """maxima_NM float32: of each row its 16·B columns, then its B blocks."""
    num_blocks, num_chunks = num_blocks_of(num_vectors), num_chunks_of(num_vectors)
    for i_thread in prange(threads):
        num_tasks = len(maxima) * num_chunks
        for task in range(i_thread * num_tasks // threads, (i_thread + 1) * num_tasks // threads):
            n, first = task // num_chunks, task % num_chunks * CHUNK_BLOCKS
            columns = maxima[n].ctypes.data
            for block in range(first, min(first + CHUNK_BLOCKS, num_blocks)):
                start = block * LANES
                maximum = splat(-np.inf)
                for i in range(start, min(start + LANES, num_vectors)):
                    maximum = larger(load(element, logits + n * stride + i * LANES * size), maximum)
                store(F32, columns + block * 64, maximum)
                maxima[n, num_blocks * LANES + block] = lane_max(maximum)


@device
def weight_of(key, peak, temperature):
    """e^((logit − peak) / temperature)."""
    return np.exp(np.float64((key_value(key) - peak) / temperature))


@device
def _pivot(keys, first, end):
    """One of some different keys, though not the smallest: the larger of two, else the median of
    three."""
    low, high = keys[first], keys[end - 1]
    if low > high:
        low, high = high, low
    middle = keys[(first + end) // 2]
    return high if end - first == 2 else max(low, min(middle, high))


@device
def boundary_key(keys, num_keys, target, by_mass, peak, temperature):
    """The largest key that weighs `target` with all above it, else the smallest; reorders them.

    A key weighs 1, or by mass what `weight_of` says. Splits the keys at one of them, goes on with
    the part where the boundary is, and so takes a time proportional to their number.
    """
    first, end = 0, num_keys
    while end - first > 1:
        pivot = _pivot(keys, first, end)
        split, weight = first, 0.0
        for i in range(first, end):
            key = keys[i]
            keys[i], keys[split] = keys[split], key
            if key >= pivot:
                split += 1
                weight += weight_of(key, peak, temperature) if by_mass else 1.0
        if weight >= target:
            end = split
        else:
            target -= weight
            first = split
    return keys[first]


@device
def _floor(maxima, num_blocks, k, keys):
    """A lower bound of the k-th largest logit, and hardly lower where logits are independent."""
    if 4 * k <= num_blocks:
        first, num_maxima = num_blocks * LANES, num_blocks
    else:
        first, num_maxima = 0, num_blocks * LANES
        if 2 * k > num_maxima:
            return _NO_LESS_THAN
    for i in range(num_maxima):
        keys[i] = rank_key(maxima[first + i], i)
    kth = boundary_key(keys, num_maxima, float(k), False, np.float32(0), np.float32(1))
    return max(key_value(kth), _NO_LESS_THAN)


@device
def list_largest(element, size, row, num_vectors, maxima, k, keys):
    """Put the keys of a row's k largest logits first in `keys`, in no order; returns how many.

    There are fewer than k if the others are −∞. `keys` has room for all of the row's.
    """
    num_blocks = num_blocks_of(num_vectors)
    floor = _floor(maxima, num_blocks, k, keys)
    num_keys = 0
    for block in range(num_blocks):
        if maxima[num_blocks * LANES + block] >= floor:
            num_keys = _list_block(element, size, row, num_vectors, block, floor, keys, num_keys)
    if num_keys <= k:
        return num_keys
    boundary_key(keys, num_keys, float(k), False, np.float32(0), np.float32(1))
    return k


@device
def _list_block(element, size, row, num_vectors, block, floor, keys, num_keys):
    for i in range(block * LANES, min(block * LANES + LANES, num_vectors)):
        flags = at_least(load(element, row + i * LANES * size), splat(floor))
        token = i * LANES
        while flags:
            if flags & 1:
                keys[num_keys] = rank_key(load_scalar(element, row + token * size), token)
                num_keys += 1
            flags >>= 1
            token += 1
    return num_keys


class Rows(NamedTuple):
    """What kernels are told of logits: their element and its bytes, where the first row begins, the
    bytes from row to row, and the vectors in each."""

    element: Any
    size: int
    address: int
    stride: int
    num_vectors: int

    @classmethod
    def of(cls, logits_NV: Tensor) -> "Rows":
        size, num_vectors = logits_NV.element_size(), logits_NV.shape[1] // LANES
        element = F32 if logits_NV.dtype == torch.float32 else BF16
        stride = logits_NV.stride(0) * size
        return cls(element, size, logits_NV.data_ptr(), stride, num_vectors)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_vectors // LANES)

    @property
    def num_chunks(self) -> int:
        return -(-self.num_blocks // CHUNK_BLOCKS)

    def empty_maxima(self, num_rows: int) -> Array:
        """For `find_maxima`."""
        return np.empty((num_rows, self.num_blocks * (LANES + 1)), np.float32)

    def empty_lists(self, num_lists: int) -> Array:
        """Room for a key of each token; memory that isn't written to costs nothing."""
        return np.empty((num_lists, self.num_vectors * LANES), np.int64)
