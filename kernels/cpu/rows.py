"""What the operations on rows of activations share: elements, their norm, and who computes which.

An operation is a function of the rows [first, last). Python calls it itself where there is little
to do, as starting threads takes longer than the norms of some rows; otherwise a kernel gives each
thread its share. A row is computed by one thread and in one way, whatever else is in the batch.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bezel.kernels.cpu.jit import device
from bezel.kernels.cpu.lanes import BF16, F32, LANES, lane_sum, load, splat

# With as many values as this or fewer one thread is done before the others have started.
FEW_VALUES = 1 << 16

_BYTES = {types.int8: 1, types.uint16: 2, types.float64: 2, types.float32: 4}


@intrinsic
def num_bytes(typing: Any, element: Any) -> Any:
    """Size of an element, a constant of the compiled code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), _BYTES[element])

    return types.int64(element), generate


def serial(function: Callable[..., Any]) -> Any:
    """Compile what Python calls for little work, and kernels for the share of a thread."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


def element_of(x: torch.Tensor) -> Any:
    """What tells kernels the dtype of `x`."""
    return F32 if x.dtype is torch.float32 else BF16


@device
def share(i_thread, threads, num_rows):
    """First row of a thread; its last is before the first one of the next thread."""
    return num_rows * i_thread // threads


@device
def inverse_rms(element, x, width, eps):
    """1 / sqrt(mean(x²) + eps) of a row."""
    step = LANES * num_bytes(element)
    end = x + width * num_bytes(element)
    # Four sums, as each addition would wait for the one before.
    sum_0, sum_1, sum_2, sum_3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    whole = end - width % (4 * LANES) * num_bytes(element)
    for p in range(x, whole, 4 * step):
        x_0, x_1 = load(element, p), load(element, p + step)
        x_2, x_3 = load(element, p + 2 * step), load(element, p + 3 * step)
        sum_0, sum_1 = sum_0 + x_0 * x_0, sum_1 + x_1 * x_1
        sum_2, sum_3 = sum_2 + x_2 * x_2, sum_3 + x_3 * x_3
    for p in range(whole, end, step):
        sum_0 = sum_0 + load(element, p) * load(element, p)
    return 1.0 / math.sqrt(lane_sum((sum_0 + sum_1) + (sum_2 + sum_3)) / width + eps)
