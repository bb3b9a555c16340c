"""Slots sorted by expert on CPUs, and rows taken there and back: see `kernels/moe_dispatch.py`.

How many rows an expert gets is known only when a step runs. Its products look it up in `blocks_M3`,
so that a recorded step can have other experts each time.
"""

import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import load_i32, load_i64, store_i32, store_i64
from bezel.kernels.cpu.launch import Operation, launch
from bezel.kernels.cpu.rows import serial, share
from bezel.kernels.moe_dispatch import max_blocks

BLOCK_BYTES = 12  # expert, first, end
_FEW_BYTES = 1 << 17


@device
def _write_block(block, expert, first, end):
    store_i32(block, expert)
    store_i32(block + 4, first)
    store_i32(block + 8, end)


@serial
def dispatch_slots(
    first, last, chosen, num_slots, num_experts, block_rows, counts, order, blocks, num_blocks
):
    """All of it is one row of work: a counting sort, quick beside the products that follow."""
    if first == last:
        return
    for e in range(num_experts):
        store_i32(counts + 4 * e, 0)
    for n in range(num_slots):
        count = counts + 4 * load_i32(chosen + 4 * n)
        store_i32(count, load_i32(count) + 1)
    end = 0
    for e in range(num_experts):
        begin = end
        end += load_i32(counts + 4 * e)
        store_i32(counts + 4 * e, begin)  # from now on the place of its next slot
        for row in range(begin, end, block_rows):
            _write_block(blocks, e, row, min(row + block_rows, end))
            blocks += BLOCK_BYTES
            num_blocks -= 1
    for m in range(num_blocks):
        _write_block(blocks + m * BLOCK_BYTES, -1, 0, 0)
    for n in range(num_slots):
        place = counts + 4 * load_i32(chosen + 4 * n)
        store_i32(order + 4 * load_i32(place), n)
        store_i32(place, load_i32(place) + 1)


@device
def _copy(source, target, num_bytes):
    for k in range(0, num_bytes, 8):
        store_i64(target + k, load_i64(source + k))


@serial
def gather_rows(first, last, order, top_k, source, source_pitch, target, target_pitch, row_bytes):
    """Row r is that of the token whose slot comes r-th."""
    for r in range(first, last):
        token = load_i32(order + 4 * r) // top_k
        _copy(source + token * source_pitch, target + r * target_pitch, row_bytes)


@serial
def scatter_rows(first, last, order, source, source_pitch, target, target_pitch, row_bytes):
    """Row r goes to the slot that comes r-th."""
    for r in range(first, last):
        slot = load_i32(order + 4 * r)
        _copy(source + r * source_pitch, target + slot * target_pitch, row_bytes)


@kernel
def _gather_all(threads, num_rows, *numbers):
    for i in prange(threads):
        gather_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *numbers)


@kernel
def _scatter_all(threads, num_rows, *numbers):
    for i in prange(threads):
        scatter_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *numbers)


_DISPATCH = Operation("dispatch", dispatch_slots, dispatch_slots)
_GATHER = Operation("gather", gather_rows, _gather_all)
_SCATTER = Operation("scatter", scatter_rows, _scatter_all)


def dispatch(chosen_TA: Tensor, num_experts: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """sorted_slots_N and blocks_M3, as those of `moe_dispatch`."""
    assert chosen_TA.is_contiguous() and chosen_TA.dtype is torch.int32
    num_slots = chosen_TA.numel()
    num_blocks = max_blocks(num_slots, num_experts, block_rows)
    order_N, blocks_M3 = chosen_TA.new_empty(num_slots), chosen_TA.new_empty(num_blocks, 3)
    counts_E = chosen_TA.new_empty(num_experts)
    numbers = (
        chosen_TA.data_ptr(),
        num_slots,
        num_experts,
        block_rows,
        counts_E.data_ptr(),
        order_N.data_ptr(),
        blocks_M3.data_ptr(),
        num_blocks,
    )
    launch(_DISPATCH, 1, True, numbers)
    return order_N, blocks_M3


def gather(x_TB: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """Row r is x[order[r] // top_k]; rows are contiguous and a multiple of 8 bytes."""
    x_RB = x_TB.new_empty(len(order_R), x_TB.shape[1])
    _move(_GATHER, x_TB, x_RB, order_R.data_ptr(), top_k)
    return x_RB


def scatter(y_RB: Tensor, order_R: Tensor) -> Tensor:
    """Row order[r] is y[r]; rows are contiguous and a multiple of 8 bytes."""
    y_NB = y_RB.new_empty(y_RB.shape)
    _move(_SCATTER, y_RB, y_NB, order_R.data_ptr())
    return y_NB


def _move(operation: Operation, source: Tensor, target: Tensor, *numbers: int) -> None:
    num_rows, width = target.shape
    row_bytes = width * target.itemsize
    assert source.stride(1) == 1 and row_bytes % 8 == 0
    pitch = source.stride(0) * source.itemsize
    addresses = (source.data_ptr(), pitch, target.data_ptr(), row_bytes, row_bytes)
    launch(operation, num_rows, num_rows * row_bytes <= _FEW_BYTES, (*numbers, *addresses))
