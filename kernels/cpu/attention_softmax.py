"""Softmax for attention on lanes: maxima, powers of two, and weights as words for their product.

Scores of many queries are a lane vector for each key. Those of few queries stand as `fold` of
attention_tiles.py gives them: in one lane vector each query of a tile with each key of the tile.
"""

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from bezel.kernels.cpu import lanes as vector
from bezel.kernels.cpu.attention_tiles import _fma, _shuffled
from bezel.kernels.cpu.lanes import LANES

_SHORTS = ir.VectorType(vector._I16, LANES)
_ROUNDING = 12582912.0  # 1.5 · 2²³: added to a small number, it leaves the nearest integer
# 2^f for f in [−½, ½]: relative error under 4e-8, and 1 at 0.
_EXP2 = (1.0, 0.69314718, 0.24022651, 0.05550327, 0.00961767, 0.00133998, 0.00015461)


def _round_to_words(builder: Any, low: Any, high: Any) -> Any:
    """Words of two bfloat16 each."""
    parts = [
        builder.zext(
            builder.bitcast(vector._narrowed(builder, x, vector._BFloat()), _SHORTS), vector._INTS
        )
        for x in (low, high)
    ]
    upper = builder.shl(parts[1], vector._all(vector._INTS, 16))
    return builder.bitcast(builder.or_(parts[0], upper), vector._FLOATS)


@intrinsic
def pair_words(typing: Any, low: Any, high: Any) -> Any:
    """Round two float lanes to bfloat16 and make words of what stands in the same lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _round_to_words(builder, *arguments)

    return low(low, high), generate


@intrinsic
def pair_key_words(typing: Any, tile: Any, first: Any, second: Any) -> Any:
    """The same for weights of keys × queries, as `fold` gives them for a tile like `tile`: words of
    neighbouring keys, key pair by key pair."""
    num_queries = tile.num_columns

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        even = [
            2 * num_queries * pair + query
            for pair in range(LANES // num_queries)
            for query in range(num_queries)
        ]
        orders = even, [place + num_queries for place in even]
        _, first_, second_ = arguments
        low, high = (_shuffled(builder, first_, second_, order) for order in orders)
        return _round_to_words(builder, low, high)

    return first(tile, first, second), generate


def _across_keys(combine: Any) -> Any:
    @intrinsic
    def across_keys(typing: Any, tile: Any, lanes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value, step = arguments[1], LANES // 2
            while step >= tile.num_columns:
                other = _shuffled(builder, value, value, [i ^ step for i in range(LANES)])
                value = combine(builder, value, other)
                step //= 2
            return value

        return lanes(tile, lanes), generate

    return across_keys


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


# Of what `fold` gives for a tile like `tile`: each query's result stands in all of its lanes.
sum_over_keys = _across_keys(lambda builder, left, right: builder.fadd(left, right))
most_over_keys = _across_keys(_larger)


@intrinsic
def larger(typing: Any, left: Any, right: Any) -> Any:
    """The larger of two float lanes; one instruction, unlike `maximum`, if a number is missing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _larger(builder, *arguments)

    return left(left, right), generate


@intrinsic
def keep_between(typing: Any, lanes: Any, number: Any, first: Any, last: Any) -> Any:
    """Lanes where first ≤ number ≤ last, −∞ elsewhere; all of them float lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, number_, first_, last_ = arguments
        is_kept = builder.and_(
            builder.fcmp_ordered("<=", first_, number_),
            builder.fcmp_ordered("<=", number_, last_),
        )
        nothing = ir.Constant(vector._FLOATS, [float("-inf")] * LANES)
        return builder.select(is_kept, value, nothing)

    return lanes(lanes, number, first, last), generate


@intrinsic
def exp2_below(typing: Any, x: Any, most: Any, scale: Any) -> Any:
    """2^((x − most) · scale) for x ≤ most; exactly 0 from 2^−127 down."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, most_, scale_ = arguments
        power = builder.fmul(builder.fsub(value, most_), scale_)
        lowest = vector._all(vector._FLOATS, -127.0)
        power = builder.select(builder.fcmp_ordered("<", power, lowest), lowest, power)
        shift = vector._all(vector._FLOATS, _ROUNDING)
        shifted = builder.fadd(power, shift)
        rest = builder.fsub(power, builder.fsub(shifted, shift))
        result = vector._all(vector._FLOATS, _EXP2[-1])
        for coefficient in reversed(_EXP2[:-1]):
            result = _fma(builder, result, rest, vector._all(vector._FLOATS, coefficient))
        # The integer stands in the low bits of `shifted`; the exponent begins at bit 23.
        exponent = builder.shl(
            builder.bitcast(shifted, vector._INTS), vector._all(vector._INTS, 23)
        )
        bits = builder.add(builder.bitcast(result, vector._INTS), exponent)
        return builder.bitcast(bits, vector._FLOATS)

    return x(x, most, scale), generate
