"""Recorded launches run as one kernel: a decode step without Python in between.

    row of the table   [ code | rows | numbers … | counter ]         int64; floats by their bits

A program computes in bfloat16 or in float32, which says its *element*; for each there is a kernel.

All threads go through the table together. Each takes its share of a launch, then waits until the
others are done with theirs. In one step that is some hundred waits of less than a microsecond,
where Python takes ten for a launch, and a thread that went to sleep in between as long to wake up.
"""

import struct
import sys
from collections.abc import Sequence

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from bezel.kernels.cpu.attention_split import Call
from bezel.kernels.cpu.combine import combine_rows, route_rows
from bezel.kernels.cpu.decode_attention import join_splits, plan_splits, work_in_program
from bezel.kernels.cpu.gelu import gelu_rows
from bezel.kernels.cpu.gemm import (
    I4,
    bfloat16_kind,
    multiply_block_tasks,
    multiply_tasks,
    quantize_rows,
)
from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import BF16, I8, load_i64, store_i64
from bezel.kernels.cpu.launch import CannotRecord, Launch
from bezel.kernels.cpu.moe import dispatch_slots, gather_rows, scatter_rows
from bezel.kernels.cpu.norms import add_norm_rows, norm_rows
from bezel.kernels.cpu.packed_rows import unpack_rows
from bezel.kernels.cpu.qkv import qkv_rows
from bezel.kernels.cpu.rotary import table_rows
from bezel.kernels.cpu.rows import share

WIDTH = 32  # int64 numbers of a row of the table
_COUNTER = 8 * (WIDTH - 1)
_SPINS = 2000  # looks at the barrier before others are let on this core
_CODES = {
    name: code
    for code, name in enumerate(
        (
            "norm",
            "add_norm",
            "qkv",
            "gelu",
            "rotary",
            "quantize",
            "multiply_bfloat16",
            "multiply_int8",
            "multiply_int4",
            "unpack_bfloat16",
            "unpack_int8",
            "unpack_int4",
            "plan_attention",
            "attend",
            "join_attention",
            "route",
            "dispatch",
            "gather",
            "scatter",
            "multiply_experts_bfloat16",
            "multiply_experts_int8",
            "multiply_experts_int4",
            "combine",
        )
    )
}


@intrinsic
def _f(typing, address, index):
    """Number `index` of a launch as float64."""

    def generate(context, builder, signature, arguments):
        place = builder.add(arguments[0], builder.mul(arguments[1], ir.Constant(ir.IntType(64), 8)))
        return builder.load(builder.inttoptr(place, ir.DoubleType().as_pointer()))

    return types.float64(address, index), generate


@device
def _i(address, index):
    return load_i64(address + 8 * index)


@intrinsic
def _arrive(typing, address):
    """Count this thread in; what it has written is seen by whoever sees the count."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "acq_rel")
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic
def _count(typing, address):
    """How many have come."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(address), generate


@intrinsic
def _yield_core(typing):
    """Let another thread run here: without it, whoever is waited for might not."""

    def generate(context, builder, signature, arguments):
        if sys.platform != "win32":
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield"
            )
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@device
def _wait(barrier, wanted):
    spins = 0
    while _count(barrier) < wanted:
        spins += 1
        if spins >= _SPINS:
            _yield_core()


@device
def _multiply(weight, element, p, counter):
    multiply_tasks(
        counter, weight, element, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5),
        _i(p, 6), _i(p, 7), _i(p, 8), _i(p, 9), _i(p, 10), _i(p, 11), _i(p, 12), _i(p, 13),
    )  # fmt: skip


@device
def _multiply_experts(weight, element, p, counter):
    multiply_block_tasks(
        counter, weight, element, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5),
        _i(p, 6), _i(p, 7), _i(p, 8), _i(p, 9), _i(p, 10), _i(p, 11), _i(p, 12), _i(p, 13),
        _i(p, 14),
    )  # fmt: skip


@device
def _unpack(weight, element, first, last, p):
    unpack_rows(
        first, last, weight, element, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5),
        _i(p, 6), _f(p, 7),
    )  # fmt: skip


@device
def _call(p):
    return Call(
        _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5), _i(p, 6), _i(p, 7), _i(p, 8),
        _i(p, 9), _i(p, 10), _i(p, 11), _i(p, 12), _i(p, 13), _i(p, 14), _i(p, 15), _i(p, 16),
        _i(p, 17), _i(p, 18), _i(p, 19), _f(p, 20),
    )  # fmt: skip


@device
def _run_row(element, code, i_thread, threads, first, last, p, counter):
    """A thread's share of one launch, whose numbers begin at `p`."""
    if code == 0:
        norm_rows(first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _f(p, 5), element)
    elif code == 1:
        add_norm_rows(
            first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5), _f(p, 6),
            _i(p, 7), _i(p, 8), _i(p, 9), _i(p, 10), _i(p, 11), _i(p, 12), _f(p, 13), element,
        )  # fmt: skip
    elif code == 2:
        qkv_rows(
            first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5), _f(p, 6),
            _i(p, 7), _i(p, 8), _i(p, 9), _i(p, 10), _i(p, 11), _i(p, 12), _i(p, 13), _i(p, 14),
            _i(p, 15), _i(p, 16), _i(p, 17), _i(p, 18), _i(p, 19), _i(p, 20) != 0, _i(p, 21) != 0,
            _i(p, 22) != 0, element,
        )  # fmt: skip
    elif code == 3:
        gelu_rows(
            first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5), element
        )  # fmt: skip
    elif code == 4:
        table_rows(first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4))
    elif code == 5:
        quantize_rows(
            first, last, element, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5) != 0,
            _i(p, 6),
        )  # fmt: skip
    elif code == 6:
        _multiply(bfloat16_kind(element), element, p, counter)
    elif code == 7:
        _multiply(I8, element, p, counter)
    elif code == 8:
        _multiply(I4, element, p, counter)
    elif code == 9:
        _unpack(BF16, element, first, last, p)
    elif code == 10:
        _unpack(I8, element, first, last, p)
    elif code == 11:
        _unpack(I4, element, first, last, p)
    elif code == 12:
        if first < last:
            plan_splits(_call(p + 24))
    elif code == 13:
        work_in_program(
            element, _call(p + 24), _i(p, 0), _i(p, 1), counter, _i(p, 2), i_thread
        )  # fmt: skip
    elif code == 14:
        join_splits(element, _call(p + 24), first, last, _i(p, 2))
    elif code == 15:
        route_rows(
            first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5), _i(p, 6),
            element, element,
        )  # fmt: skip
    elif code == 16:
        dispatch_slots(
            first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5), _i(p, 6),
            _i(p, 7),
        )  # fmt: skip
    elif code == 17:
        gather_rows(
            first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5), _i(p, 6)
        )  # fmt: skip
    elif code == 18:
        scatter_rows(first, last, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5))
    elif code == 19:
        _multiply_experts(bfloat16_kind(element), element, p, counter)
    elif code == 20:
        _multiply_experts(I8, element, p, counter)
    elif code == 21:
        _multiply_experts(I4, element, p, counter)
    elif code == 22:
        combine_rows(
            first, last, i_thread, _i(p, 0), _i(p, 1), _i(p, 2), _i(p, 3), _i(p, 4), _i(p, 5),
            _i(p, 6), _i(p, 7), _i(p, 8), _i(p, 9), _i(p, 10), _f(p, 11), _i(p, 12), _i(p, 13),
            _i(p, 14), _i(p, 15), _i(p, 16), _f(p, 17), element,
        )  # fmt: skip


@kernel
def _run(element, table, num_launches, barrier, threads):
    for i in range(num_launches):
        store_i64(table + 8 * WIDTH * i + _COUNTER, 0)
    store_i64(barrier, 0)
    for i_thread in prange(threads):
        for i in range(num_launches):
            row = table + 8 * WIDTH * i
            num_rows = _i(row, 1)
            first = share(i_thread, threads, num_rows)
            last = share(i_thread + 1, threads, num_rows)
            _run_row(element, _i(row, 0), i_thread, threads, first, last, row + 16, row + _COUNTER)
            _arrive(barrier)
            _wait(barrier, threads * (i + 1))


@kernel
def _meet(barrier, missed, threads):
    """Let all threads wait for each other, but not forever."""
    for _ in prange(threads):
        _arrive(barrier)
        spins = 0
        while _count(barrier) < threads and spins < 1 << 22:
            spins += 1
            if spins >= _SPINS:
                _yield_core()
        if spins == 1 << 22:
            _arrive(missed)


def _num_threads() -> int:
    """Threads that wait for each other: no more than there are, and than launches made room for."""
    return min(torch.get_num_threads(), int(numba.get_num_threads()))


def threads_run_together() -> bool:
    """Whether there are as many threads as programs count on: a library of threads that was told
    to use fewer would have them wait for ones that never come."""
    counts = np.zeros(2, np.int64)
    _meet(counts.ctypes.data, counts.ctypes.data + 8, _num_threads())
    return bool(counts[1] == 0)


class Program:
    """The launches of a recorded step, by `names`; `run` computes it anew.

    Raises:
        CannotRecord: from the constructor, if there is a launch that programs can't have, or if
            the launches don't all compute in the same dtype.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        rows = np.zeros((len(launches) + 1, WIDTH), np.int64)
        for row, launch in zip(rows, launches, strict=False):
            if launch.name not in _CODES:
                raise CannotRecord(launch.name)
            numbers = [_bits(x) for x in launch.numbers if not isinstance(x, np.generic)]
            row[: 2 + len(numbers)] = [_CODES[launch.name], launch.num_rows, *numbers]
        self._element = _element_of(launches)
        self._rows = rows  # the last one is the barrier
        self.names = [launch.name for launch in launches]

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Compute launches [first, last), by default all: some need what those before left."""
        table = self._rows.ctypes.data
        barrier = table + 8 * WIDTH * len(self.names)
        count = (len(self.names) if last is None else last) - first
        _run(self._element, table + 8 * WIDTH * first, count, barrier, _num_threads())


def _element_of(launches: Sequence[Launch]) -> np.generic:
    """What all launches compute in. Of those with weights the first tag is the weights' kind."""
    elements: dict[type, np.generic] = {}
    for launch in launches:
        tags = [x for x in launch.numbers if isinstance(x, np.generic)]
        for tag in tags[launch.name.startswith(("multiply", "unpack")) :]:
            elements[type(tag)] = tag
    if len(elements) != 1:
        raise CannotRecord(f"launches in {len(elements)} dtypes")
    return elements.popitem()[1]


def _bits(number: float) -> int:
    if isinstance(number, float):
        bits: int = struct.unpack("q", struct.pack("d", number))[0]
        return bits
    return int(number)
