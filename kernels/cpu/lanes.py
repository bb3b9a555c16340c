"""Vectors of 16 lanes for Numba: what the kernels for CPUs are written in.

    lanes   16 float32 or 16 int32 values, one register of AVX-512, two of AVX2, four of NEON
    tile    R × C lanes that live in registers: R rows of x against C blocks of 16 columns of w

Numba compiles loops of scalars well, but neither 16-bit floats nor the instructions that multiply
and add four bytes or two bfloat16 at once can be said in them. Here each is one function. What the
machine has no instruction for is put together of plain ones, with the same result for integers and
the same up to rounding for floats.

Memory is addressed by int64 addresses, as `Tensor.data_ptr()` gives them. What stands there is said
by an *element*, a number whose type counts and whose value doesn't: BF16, F32, F16 or I8.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
BF16, F32, F16, I8 = np.uint16(0), np.float32(0), np.float64(0), np.int8(0)

_I8, _I16, _I32, _I64, _F32 = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType())
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_BYTES, _SHORTS = ir.VectorType(_I8, 4 * LANES), ir.VectorType(_I16, 2 * LANES)
_LOG2_E = 1.4426950408889634
# 2^f for f in [−½, ½], least squares on Chebyshev nodes: relative error under 2e-7 in float32.
_EXP2 = (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00961812, 0.00133336, 0.00015469)


def has_feature(name: str) -> bool:
    """Whether kernels are compiled for a CPU that has it, in LLVM's spelling."""
    chosen = config.CPU_FEATURES
    if chosen is not None:
        return f"+{name}" in chosen.split(",")
    return bool(binding.get_host_cpu_features().get(name, False))


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite doesn't name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class Tile(types.Type):  # type: ignore[misc]
    """`num_rows` × `num_columns` lanes of float32 or int32; plain lanes are 1 × 1."""

    def __init__(self, is_float: bool, num_rows: int = 1, num_columns: int = 1) -> None:
        self.is_float, self.num_rows, self.num_columns = is_float, num_rows, num_columns
        kind = "float32" if is_float else "int32"
        super().__init__(name=f"Tile({kind}, {num_rows}, {num_columns})")

    @property
    def lanes(self) -> ir.VectorType:
        return _FLOATS if self.is_float else _INTS

    @property
    def count(self) -> int:
        return self.num_rows * self.num_columns

    @property
    def key(self) -> tuple[bool, int, int]:
        return self.is_float, self.num_rows, self.num_columns


@register_model(Tile)
class _TileModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, tile: Tile) -> None:
        is_lanes = tile.count == 1
        super().__init__(
            manager, tile, tile.lanes if is_lanes else ir.ArrayType(tile.lanes, tile.count)
        )


_LANES, _INT_LANES = Tile(is_float=True), Tile(is_float=False)


def _pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, kind: ir.Type, align: int) -> Any:
    value = builder.load(_pointer(builder, address, kind))
    value.align = align
    return value


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _splat(builder: Any, scalar: Any, kind: ir.VectorType) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    zeros = _all(ir.VectorType(_I32, kind.count), 0)
    return builder.shuffle_vector(first, undefined, zeros)


def _call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    kinds = [argument.type for argument in arguments]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, kinds), name)
    return builder.call(function, arguments)


def _stored_kind(element: types.Type) -> ir.Type:
    kinds = {types.uint16: _BFloat(), types.float32: _F32, types.float64: ir.HalfType()}
    return kinds.get(element, _I8)


def _narrowed(builder: Any, value: Any, kind: ir.Type) -> Any:
    """Float lanes rounded to 16 bits, to nearest with ties to even."""
    if not isinstance(kind, _BFloat) or has_feature("avx512bf16"):
        return builder.fptrunc(value, ir.VectorType(kind, LANES))
    # LLVM would call a function here that isn't everywhere.
    bits = builder.bitcast(value, _INTS)
    sixteen, one = _all(_INTS, 16), _all(_INTS, 1)
    is_odd = builder.and_(builder.lshr(bits, sixteen), one)
    rounded = builder.add(builder.add(bits, _all(_INTS, 0x7FFF)), is_odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    # A NaN's last bits must not carry it over to zero.
    chosen = builder.select(is_nan, builder.or_(bits, _all(_INTS, 1 << 22)), rounded)
    return builder.trunc(builder.lshr(chosen, sixteen), ir.VectorType(_I16, LANES))


@intrinsic
def load(typing: Any, element: Any, address: Any) -> Any:
    """16 neighbouring elements as float lanes."""
    kind = _stored_kind(element)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(kind, LANES)
        if isinstance(kind, _BFloat):  # a shift: the conversion of bfloat isn't everywhere
            bits = _load(builder, arguments[1], ir.VectorType(_I16, LANES), 2)
            wide = builder.shl(builder.zext(bits, _INTS), _all(_INTS, 16))
            return builder.bitcast(wide, _FLOATS)
        if kind == _F32:
            return _load(builder, arguments[1], vector, 4)
        if kind == _I8:
            return builder.sitofp(_load(builder, arguments[1], vector, 1), _FLOATS)
        return builder.fpext(_load(builder, arguments[1], vector, 2), _FLOATS)

    return _LANES(element, address), generate


@intrinsic
def store(typing: Any, element: Any, address: Any, lanes: Any) -> Any:
    """Round float lanes to 16 neighbouring elements: to nearest, ties to even."""
    kind = _stored_kind(element)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(kind, LANES)
        value = arguments[2]
        if kind == _I8:
            value = builder.fptosi(_call(builder, "llvm.rint.v16f32", _FLOATS, value), vector)
        elif kind != _F32:
            value = _narrowed(builder, value, kind)
        pointer = _pointer(builder, arguments[1], value.type)
        builder.store(value, pointer).align = {_I8: 1, _F32: 4}.get(kind, 2)
        return context.get_dummy_value()

    return types.void(element, address, lanes), generate


@intrinsic
def load_scalar(typing: Any, element: Any, address: Any) -> Any:
    """One element as float32."""
    kind = _stored_kind(element)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if isinstance(kind, _BFloat):
            bits = builder.zext(_load(builder, arguments[1], _I16, 2), _I32)
            return builder.bitcast(builder.shl(bits, ir.Constant(_I32, 16)), _F32)
        value = _load(builder, arguments[1], kind, 1)
        if kind == _F32:
            return value
        return builder.sitofp(value, _F32) if kind == _I8 else builder.fpext(value, _F32)

    return types.float32(element, address), generate


@intrinsic
def load_i64(typing: Any, address: Any) -> Any:
    """The int64 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, arguments[0], _I64, 8)

    return types.int64(address), generate


@intrinsic
def load_i32(typing: Any, address: Any) -> Any:
    """The int32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sext(_load(builder, arguments[0], _I32, 4), _I64)

    return types.int64(address), generate


@intrinsic
def store_f32(typing: Any, address: Any, value: Any) -> Any:
    """Store one float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value32 = arguments[1]
        if signature.args[1] == types.float64:
            value32 = builder.fptrunc(value32, _F32)
        builder.store(value32, _pointer(builder, arguments[0], _F32)).align = 4
        return context.get_dummy_value()

    return types.void(address, value), generate


def _integer_store(kind: ir.Type, number: types.Integer) -> Any:
    @intrinsic
    def store_integer(typing: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            integer = context.cast(builder, arguments[1], signature.args[1], number)
            pointer = _pointer(builder, arguments[0], kind)
            builder.store(integer, pointer).align = kind.width // 8
            return context.get_dummy_value()

        return types.void(address, value), generate

    return store_integer


store_i32 = _integer_store(_I32, types.int32)
store_i64 = _integer_store(_I64, types.int64)


@intrinsic
def take_next(typing: Any, address: Any) -> Any:
    """Read the int64 at an address and add one to it, as one step even beside other threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], _I64)
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "monotonic")

    return types.int64(address), generate


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """A number in all lanes of a float vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value32 = context.cast(builder, arguments[0], signature.args[0], types.float32)
        return _splat(builder, value32, _FLOATS)

    return _LANES(value), generate


def _arithmetic(name: str) -> Any:
    """An operation on two float lanes; a product and a sum may become one instruction."""

    @intrinsic
    def operation(typing: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments, flags=("contract",))

        return _LANES(left, right), generate

    return operation


def _define(function: Callable[..., Any], name: str) -> None:
    operation = _arithmetic(name)

    @overload(function)
    def lanes_operator(left, right):
        if left == _LANES and right == _LANES:
            return lambda left, right: operation(left, right)
        return None


for _operator, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_operator, _name)


@intrinsic
def maximum(typing: Any, left: Any, right: Any) -> Any:
    """The larger of two float lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "llvm.maxnum.v16f32", _FLOATS, *arguments)

    return _LANES(left, right), generate


@intrinsic
def magnitude(typing: Any, lanes: Any) -> Any:
    """Absolute values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "llvm.fabs.v16f32", _FLOATS, *arguments)

    return _LANES(lanes), generate


def _reduction(name: str, start: float | None) -> Any:
    @intrinsic
    def reduce(typing: Any, lanes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first = [] if start is None else [ir.Constant(_F32, start)]
            result = _call(builder, f"llvm.vector.reduce.{name}.v16f32", _F32, *first, *arguments)
            result.fastmath.add("reassoc")
            return result

        return types.float32(lanes), generate

    return reduce


lane_sum = _reduction("fadd", 0.0)
lane_max = _reduction("fmax", None)


@intrinsic
def exp2(typing: Any, lanes: Any) -> Any:
    """2ˣ, to 3e-7 of its value; below x = −126 it stays 2⁻¹²⁶, above 127 it stays 2¹²⁷."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = _call(builder, "llvm.maxnum.v16f32", _FLOATS, arguments[0], _all(_FLOATS, -126.0))
        x = _call(builder, "llvm.minnum.v16f32", _FLOATS, x, _all(_FLOATS, 127.0))
        whole = _call(builder, "llvm.rint.v16f32", _FLOATS, x)
        rest = builder.fsub(x, whole)
        power = _all(_FLOATS, _EXP2[-1])
        for coefficient in reversed(_EXP2[:-1]):
            term = _all(_FLOATS, coefficient)
            power = _call(builder, "llvm.fma.v16f32", _FLOATS, power, rest, term)
        exponent = builder.add(builder.fptosi(whole, _INTS), _all(_INTS, 127))
        scale = builder.bitcast(builder.shl(exponent, _all(_INTS, 23)), _FLOATS)
        return builder.fmul(power, scale)

    return _LANES(lanes), generate
