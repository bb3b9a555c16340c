"""`kernels.token_mask` on CPUs: half a word of a mask against 16 logits.

Words that allow all of their tokens are passed over.
"""

import math
from typing import Any

import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from bezel.kernels.cpu.jit import kernel
from bezel.kernels.cpu.lanes import LANES, Tile, load_i32, load_i64

_FLOATS = Tile(is_float=True).lanes
_SMALL = 1 << 14  # logits that one thread is done with before another has begun


@intrinsic
def _forbid(typing: Any, address: Any, allowed: Any) -> Any:
    """Store −∞ over those of 16 float32 whose bit of an int64 isn't set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _FLOATS.as_pointer())
        values = builder.load(pointer)
        values.align = 4
        bits = builder.trunc(arguments[1], ir.IntType(LANES))
        flags = builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))
        infinite = ir.Constant(_FLOATS, [-math.inf] * LANES)
        builder.store(builder.select(flags, values, infinite), pointer).align = 4
        return context.get_dummy_value()

    return types.void(address, allowed), generate


@kernel
def _apply(logits, stride, num_vectors, rows, masks, mask_stride, num_masks, threads):
    num_words = (num_vectors + 1) // 2
    for i_thread in prange(threads):
        num_tasks = num_masks * num_words
        for task in range(i_thread * num_tasks // threads, (i_thread + 1) * num_tasks // threads):
            m, word = task // num_words, task % num_words
            allowed, n = load_i32(masks + m * mask_stride + word * 4), load_i64(rows + m * 8)
            if n < 0 or allowed == -1:
                continue
            for i in range(2 * word, min(2 * word + 2, num_vectors)):
                _forbid(logits + n * stride + i * LANES * 4, allowed)
                allowed >>= LANES


def apply_token_mask(logits_NV: Tensor, rows_M: Tensor, mask_MW: Tensor) -> None:
    """As `kernels.token_mask.apply_token_mask`; V is a multiple of 16."""
    num_masks, vocab_size = len(mask_MW), logits_NV.shape[1]
    _apply(
        logits_NV.data_ptr(),
        logits_NV.stride(0) * 4,
        vocab_size // LANES,
        rows_M.contiguous().data_ptr(),
        mask_MW.data_ptr(),
        mask_MW.stride(0) * 4,
        num_masks,
        torch.get_num_threads() if num_masks * vocab_size > _SMALL else 1,
    )
