"""Where top_p cuts a whole row, on CPUs, without sorting it.

    z = (x − peak) / T        mass of a token = e^z, at most 1

Tokens are counted into buckets of z by mass, from which it can be told in whose bucket the boundary
falls; the keys of that one bucket are listed, and searched for it:

    z    0 ┊ bucket 0 │ 1 │ 2 │ …        ┊ floor            −∞
           ╰ masses add up to top_p · total, in bucket 2 say

Whatever has z below ln((1 − top_p) / V) is together less than is to be cut, so the boundary isn't
there, and only the total needs it. A chunk's sums are its own, joined in the order of the chunks.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from bezel.kernels.cpu.candidates import (
    CHUNK_BLOCKS,
    at_least,
    boundary_key,
    num_blocks_of,
    num_chunks_of,
    rank_key,
)
from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import LANES, Tile, exp2, lane_sum, load, load_scalar, maximum, splat

NUM_BUCKETS = 1024
# Neighbouring lanes add to different places, so that equal logits don't wait for each other.
BUCKET_WIDTH = 4

_LOG2_E = np.float32(math.log2(math.e))
_INT_LANES = Tile(is_float=False)


@intrinsic
def _buckets(typing: Any, places: Any) -> Any:
    """Float lanes from 0 on, rounded down to int lanes, at most the last bucket."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = arguments[0].type
        last = ir.Constant(lanes, [float(NUM_BUCKETS - 1)] * LANES)
        least = builder.module.declare_intrinsic(
            "llvm.minnum.v16f32", fnty=ir.FunctionType(lanes, [lanes, lanes])
        )
        return builder.fptosi(builder.call(least, [arguments[0], last]), _INT_LANES.lanes)

    return _INT_LANES(places), generate


@intrinsic
def _add_to_buckets(typing: Any, address: Any, buckets: Any, masses: Any) -> Any:
    """Add 16 masses to the float32 sums at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, buckets, masses = arguments
        single, whole = ir.FloatType(), ir.IntType(64)
        base = builder.inttoptr(address, single.as_pointer())
        for i in range(LANES):
            lane = ir.Constant(ir.IntType(32), i)
            bucket = builder.zext(builder.extract_element(buckets, lane), whole)
            place = builder.mul(bucket, ir.Constant(whole, BUCKET_WIDTH))
            place = builder.add(place, ir.Constant(whole, i % BUCKET_WIDTH))
            pointer = builder.gep(base, [place])
            mass = builder.extract_element(masses, lane)
            builder.store(builder.fadd(builder.load(pointer), mass), pointer)
        return context.get_dummy_value()

    return types.void(address, buckets, masses), generate


@intrinsic
def _is_in(typing: Any, buckets: Any, bucket: Any) -> Any:
    """Bit i of an int64 says whether lane i is `bucket`, an int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        wanted = builder.trunc(arguments[1], ir.IntType(32))
        undefined = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(undefined, wanted, ir.Constant(ir.IntType(32), 0))
        same = builder.shuffle_vector(first, undefined, ir.Constant(kind, [0] * LANES))
        flags = builder.icmp_signed("==", arguments[0], same)
        return builder.zext(builder.bitcast(flags, ir.IntType(LANES)), ir.IntType(64))

    return types.int64(buckets, bucket), generate


@device
def _z(lanes, peak, temperature):
    return (lanes - splat(peak)) / splat(temperature)


@device
def _floor_z(top_p, num_vectors):
    return np.float32(math.log(max(1.0 - top_p, 1e-8) / (num_vectors * LANES)))


@device
def _bucket_lanes(z, floor_z):
    """NaN, of a logit that is NaN, is put into bucket 0 and has to be left out."""
    return _buckets(maximum(z * splat(np.float32(NUM_BUCKETS) / floor_z), splat(0.0)))


@kernel
def sum_buckets(
    element,
    size,
    logits,
    stride,
    num_vectors,
    rows,
    peaks,
    temperature,
    top_p,
    buckets,
    totals,
    threads,
):
    """Masses of each chunk of `rows` by bucket, float32 R×chunks×4·NUM_BUCKETS, zero at first, and
    together, float64 R×chunks."""
    num_chunks = num_chunks_of(num_vectors)
    for i_thread in prange(threads):
        num_tasks = len(rows) * num_chunks
        for task in range(i_thread * num_tasks // threads, (i_thread + 1) * num_tasks // threads):
            r, chunk = task // num_chunks, task % num_chunks
            n = rows[r]
            first, last = chunk * CHUNK_BLOCKS * LANES, (chunk + 1) * CHUNK_BLOCKS * LANES
            totals[r, chunk] = _sum_chunk(
                element,
                size,
                logits + n * stride,
                first,
                min(last, num_vectors),
                peaks[n],
                temperature[n],
                _floor_z(top_p[n], num_vectors),
                buckets[r, chunk].ctypes.data,
            )


@device
def _sum_chunk(element, size, row, first, last, peak, temperature, floor_z, buckets):
    total = splat(0.0)
    for i in range(first, last):
        z = _z(load(element, row + i * LANES * size), peak, temperature)
        z = maximum(z, splat(-np.inf))  # NaN weighs nothing
        masses = exp2(z * splat(_LOG2_E))
        total = total + masses
        if at_least(z, splat(floor_z)):
            _add_to_buckets(buckets, _bucket_lanes(z, floor_z), masses)
    return np.float64(lane_sum(total))


@kernel
def choose_buckets(top_p, rows, buckets, totals, chosen, targets, threads):
    """The bucket of each row in which top_p of its mass is reached, and how much of that is left
    for it: int64 and float64, R."""
    for i_thread in prange(threads):
        num_rows = len(rows)
        for r in range(i_thread * num_rows // threads, (i_thread + 1) * num_rows // threads):
            sums = buckets[r, 0]
            for chunk in range(1, len(totals[r])):
                sums += buckets[r, chunk]
            target = np.float64(np.float32(top_p[rows[r]] * totals[r].sum()))
            bucket = 0
            while bucket < NUM_BUCKETS - 1:
                mass = np.float64(sums[bucket * BUCKET_WIDTH : (bucket + 1) * BUCKET_WIDTH].sum())
                if mass >= target:
                    break
                target -= mass
                bucket += 1
            chosen[r], targets[r] = bucket, target


@kernel
def list_buckets(
    element,
    size,
    logits,
    stride,
    num_vectors,
    rows,
    peaks,
    temperature,
    top_p,
    maxima,
    chosen,
    keys,
    counts,
    threads,
):
    """The keys of the chosen buckets, each chunk's in its own part of keys_RV; counts int64."""
    num_chunks = num_chunks_of(num_vectors)
    num_blocks = num_blocks_of(num_vectors)
    for i_thread in prange(threads):
        num_tasks = len(rows) * num_chunks
        for task in range(i_thread * num_tasks // threads, (i_thread + 1) * num_tasks // threads):
            r, chunk = task // num_chunks, task % num_chunks
            n, first = rows[r], chunk * CHUNK_BLOCKS
            floor_z = _floor_z(top_p[n], num_vectors)
            # What the bucket's largest logit could be at least, with room for rounding.
            reach = temperature[n] * floor_z
            lowest = peaks[n] + reach * (chosen[r] + 1) / NUM_BUCKETS
            lowest -= 1e-6 * (abs(peaks[n]) + abs(reach))
            if chosen[r] == NUM_BUCKETS - 1:
                lowest = -np.inf
            own, count = keys[r, first * LANES * LANES :], 0
            for block in range(first, min(first + CHUNK_BLOCKS, num_blocks)):
                if maxima[n, num_blocks * LANES + block] >= lowest:
                    for i in range(block * LANES, min(block * LANES + LANES, num_vectors)):
                        count = _list_vector(
                            element,
                            size,
                            logits + n * stride,
                            i * LANES,
                            peaks[n],
                            temperature[n],
                            floor_z,
                            chosen[r],
                            own,
                            count,
                        )
            counts[r, chunk] = count


@device
def _list_vector(element, size, row, token, peak, temperature, floor_z, bucket, keys, num_keys):
    z = _z(load(element, row + token * size), peak, temperature)
    z = maximum(z, splat(-np.inf))
    flags = _is_in(_bucket_lanes(z, floor_z), bucket)
    while flags:
        if flags & 1:
            value = load_scalar(element, row + token * size)
            if value > -np.inf:
                keys[num_keys] = rank_key(value, token)
                num_keys += 1
        flags >>= 1
        token += 1
    return num_keys


@kernel
def find_boundaries(rows, peaks, temperature, keys, counts, targets, lows, threads):
    """The last key of each row that top_p keeps, into lows_N."""
    for i_thread in prange(threads):
        num_rows = len(rows)
        for r in range(i_thread * num_rows // threads, (i_thread + 1) * num_rows // threads):
            n, own, num_keys = rows[r], keys[r], 0
            for chunk in range(len(counts[r])):
                first = chunk * CHUNK_BLOCKS * LANES * LANES
                for i in range(first, first + counts[r, chunk]):
                    own[num_keys] = own[i]
                    num_keys += 1
            if num_keys:
                lows[n] = boundary_key(own, num_keys, targets[r], True, peaks[n], temperature[n])
