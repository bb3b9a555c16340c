"""`rotary_table` on CPUs: sines of 16 angles at once.

An angle is brought to r in [−π/4, π/4] by whole quarter turns. π/2 is taken off in two parts: the
first leaves no rounding behind, as it is one fused instruction, and what the second leaves of π/2,
2e-15, is too little to be seen in angles up to 2¹⁸.
"""

from typing import Any

import torch
from llvmlite import ir
from numba import prange
from numba.extending import intrinsic
from torch import Tensor

from bezel.kernels.cpu.jit import kernel
from bezel.kernels.cpu.lanes import (
    _FLOATS,
    _INTS,
    F32,
    LANES,
    _all,
    _call,
    load,
    load_i64,
    splat,
    store,
)
from bezel.kernels.cpu.launch import Operation, launch
from bezel.kernels.cpu.rows import serial, share

# Angles that one thread is done with before the others have started.
_FEW = 1 << 13
_TURNS = 0.6366197723675814  # 2/π
_QUARTER = (1.5707963705062866, -4.371138828673793e-08)  # π/2
# (sin r − r) / r³ and (cos r − 1 + r²/2) / r⁴ in powers of r², least squares on Chebyshev nodes:
# with them sine and cosine are good to 1e-8.
_SINE = (-0.166666646, 0.00833273694, -0.000195854334)
_COSINE = (0.0416666646, -0.00138882916, 2.45454693e-05)


@intrinsic
def _sine(typing: Any, angles: Any, quarters: Any) -> Any:
    """sin(x + quarters · π/2) of float lanes; `quarters` is an int64, 1 for the cosine."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def fma(x: Any, y: Any, z: Any) -> Any:
            return _call(builder, "llvm.fma.v16f32", _FLOATS, x, y, z)

        def polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
            value = _all(_FLOATS, coefficients[-1])
            for coefficient in reversed(coefficients[:-1]):
                value = fma(value, x, _all(_FLOATS, coefficient))
            return value

        turns = builder.fmul(arguments[0], _all(_FLOATS, _TURNS))
        turns = _call(builder, "llvm.rint.v16f32", _FLOATS, turns)
        r = arguments[0]
        for part in _QUARTER:
            r = fma(turns, _all(_FLOATS, -part), r)
        square = builder.fmul(r, r)
        sine = fma(builder.fmul(r, square), polynomial(_SINE, square), r)
        cosine = fma(square, polynomial(_COSINE, square), _all(_FLOATS, -0.5))
        cosine = fma(square, cosine, _all(_FLOATS, 1.0))
        added = builder.trunc(arguments[1], ir.IntType(32))
        zeros = ir.Constant(_INTS, ir.Undefined)
        added = builder.insert_element(zeros, added, ir.Constant(ir.IntType(32), 0))
        added = builder.shuffle_vector(added, zeros, _all(_INTS, 0))
        quarter = builder.add(builder.fptosi(turns, _INTS), added)
        is_odd = builder.icmp_signed("!=", builder.and_(quarter, _all(_INTS, 1)), _all(_INTS, 0))
        value = builder.bitcast(builder.select(is_odd, cosine, sine), _INTS)
        sign = builder.shl(builder.and_(quarter, _all(_INTS, 2)), _all(_INTS, 30))
        return builder.bitcast(builder.xor(value, sign), _FLOATS)

    return angles(angles, quarters), generate


@serial
def table_rows(first, last, positions, frequencies, cos, sin, num_pairs):
    for t in range(first, last):
        position = splat(load_i64(positions + t * 8))
        for j in range(t * num_pairs * 4, (t + 1) * num_pairs * 4, LANES * 4):
            angles = position * load(F32, frequencies + j - t * num_pairs * 4)
            store(F32, cos + j, _sine(angles, 1))
            store(F32, sin + j, _sine(angles, 0))


@kernel
def _table_all(threads, num_rows, *row):
    for i in prange(threads):
        table_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *row)


_TABLE = Operation("rotary", table_rows, _table_all)


def rotary_table(positions_T: Tensor, frequencies_J: Tensor) -> tuple[Tensor, Tensor]:
    """As the wrapper's; J is a multiple of 16 and positions are int64, below 2¹⁸."""
    num_tokens, num_pairs = positions_T.shape[0], frequencies_J.shape[0]
    assert positions_T.dtype is torch.int64 and positions_T.is_contiguous()
    assert frequencies_J.dtype is torch.float32 and frequencies_J.is_contiguous()
    cos_TJ = frequencies_J.new_empty(num_tokens, num_pairs)
    sin_TJ = torch.empty_like(cos_TJ)
    row = (
        positions_T.data_ptr(),
        frequencies_J.data_ptr(),
        cos_TJ.data_ptr(),
        sin_TJ.data_ptr(),
        num_pairs,
    )
    launch(_TABLE, num_tokens, num_tokens * num_pairs <= _FEW, row)
    return cos_TJ, sin_TJ
