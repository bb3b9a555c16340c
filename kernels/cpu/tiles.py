"""Products of tiles: R rows of x times 64 columns of w, one word of each at a time.

A *word* is four bytes of a row or column: two values in bfloat16, four in int8, eight in int4; of
rows in float32 two words go with one of weights in bfloat16. With
6 rows that is 4 loads of w and 6 broadcasts of x for 24 instructions that multiply and add, so that
loads don't hold them up. Where registers are fewer or shorter than AVX-512's such a tile has 16
columns, at the same places.

`vdpbf16ps` and `vpdpbusd` do one word of 16 columns in one instruction, AVX-VNNI in two. Where they
are missing, the same is put together of shifts and products that every CPU has.

w is unsigned and x signed, as the instruction wants them. Words of 64 columns stand together:

    w       [ word 0: 64 × 4 bytes | word 1 | … ]        x row   [ word 0: 4 bytes | word 1 | … ]
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bezel.kernels.cpu import lanes as vector
from bezel.kernels.cpu.lanes import Tile, has_feature

NUM_COLUMNS = 4  # lanes next to each other: 64 columns
WORD_BYTES = 4
TILE_BYTES = 256  # one word of all columns

# AVX2 adds products of bytes in 16 bits, which hold those of four bits with eight.
_SUMS_ARE_PAIRS = has_feature("avx2") and not (has_feature("avx512vnni") or has_feature("avxvnni"))
_BFLOATS = ir.VectorType(vector._BFloat(), 32)


def _offset(builder: Any, address: Any, pitch: Any, row: int) -> Any:
    return builder.add(address, builder.mul(pitch, ir.Constant(vector._I64, row)))


def _at(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, ir.Constant(vector._I64, num_bytes))


def _words(builder: Any, address: Any, tile: Tile) -> list[Any]:
    """The same word of a tile's columns, as 16 int32 each."""
    return [
        vector._load(builder, _at(builder, address, 64 * c), vector._INTS, 4)
        for c in range(tile.num_columns)
    ]


def _row_word(builder: Any, address: Any, pitch: Any, row: int) -> Any:
    word = vector._load(builder, _offset(builder, address, pitch, row), vector._I32, 4)
    return vector._splat(builder, word, vector._INTS)


def _widened(builder: Any, words: Any) -> tuple[Any, Any]:
    """The two bfloat16 of words, as float lanes."""
    low = builder.shl(words, vector._all(vector._INTS, 16))
    high = builder.and_(words, vector._all(vector._INTS, 0xFFFF0000))
    return builder.bitcast(low, vector._FLOATS), builder.bitcast(high, vector._FLOATS)


def _dot_bfloat(builder: Any, sums: Any, w: Any, x: Any) -> Any:
    if has_feature("avx512bf16"):
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        operands = (builder.bitcast(w, _BFLOATS), builder.bitcast(x, _BFLOATS))
        return vector._call(builder, name, vector._FLOATS, sums, *operands)

    for left, right in zip(_widened(builder, w), _widened(builder, x), strict=True):
        sums = vector._call(builder, "llvm.fma.v16f32", vector._FLOATS, left, right, sums)
    return sums


def _dot_bytes(builder: Any, sums: Any, w: Any, x: Any) -> Any:
    if has_feature("avx512vnni"):
        operands = (builder.bitcast(w, vector._BYTES), builder.bitcast(x, vector._BYTES))
        name = "llvm.x86.avx512.vpdpbusd.512"
        return vector._call(builder, name, vector._INTS, sums, *operands)
    if has_feature("avxvnni"):

        def add_products(sums_8: Any, w_8: Any, x_8: Any) -> Any:
            operands = builder.bitcast(w_8, _HALF_BYTES), builder.bitcast(x_8, _HALF_BYTES)
            name = "llvm.x86.avx512.vpdpbusd.256"
            return vector._call(builder, name, _HALF_INTS, sums_8, *operands)

        return _by_halves(builder, add_products, sums, w, x)
    eight = vector._all(vector._SHORTS, 8)
    w16, x16 = builder.bitcast(w, vector._SHORTS), builder.bitcast(x, vector._SHORTS)
    low_bytes = vector._all(vector._SHORTS, 0xFF)
    even = (builder.and_(w16, low_bytes), builder.ashr(builder.shl(x16, eight), eight))
    odd = (builder.lshr(w16, eight), builder.ashr(x16, eight))
    for left, right in (even, odd):
        sums = builder.add(sums, _pair_products(builder, left, right))
    return sums


_HALF_INTS = ir.VectorType(vector._I32, 8)
_HALF_SHORTS, _HALF_BYTES = ir.VectorType(vector._I16, 16), ir.VectorType(vector._I8, 32)


def _by_halves(builder: Any, operation: Any, *lanes: Any) -> Any:
    """An operation of eight lanes on sixteen, for instructions that AVX2 has."""
    undefined = ir.Constant(vector._INTS, ir.Undefined)
    halves = []
    for first in (0, 8):
        places = ir.Constant(_HALF_INTS, list(range(first, first + 8)))
        halves.append(operation(*(builder.shuffle_vector(v, undefined, places) for v in lanes)))
    return builder.shuffle_vector(*halves, ir.Constant(vector._INTS, list(range(16))))


def _dot_nibbles(builder: Any, sums: Any, w: Any, x: Any) -> Any:
    """As `_dot_bytes` for w from 0 to 15, perhaps with two sums in each lane: see `whole_sums`."""
    if not _SUMS_ARE_PAIRS:
        return _dot_bytes(builder, sums, w, x)

    def add_pairs(sums_8: Any, w_8: Any, x_8: Any) -> Any:
        operands = builder.bitcast(w_8, _HALF_BYTES), builder.bitcast(x_8, _HALF_BYTES)
        pairs = vector._call(builder, "llvm.x86.avx2.pmadd.ub.sw", _HALF_SHORTS, *operands)
        total = builder.add(builder.bitcast(sums_8, _HALF_SHORTS), pairs)
        return builder.bitcast(total, _HALF_INTS)

    return _by_halves(builder, add_pairs, sums, w, x)


def _pair_products(builder: Any, left: Any, right: Any) -> Any:
    """Sums of neighbouring products of 32 int16: LLVM knows the instruction for this."""
    wide = ir.VectorType(vector._I32, 32)
    product = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    parts = [
        builder.shuffle_vector(
            product, undefined, ir.Constant(vector._INTS, list(range(first, 32, 2)))
        )
        for first in (0, 1)
    ]
    return builder.add(*parts)


@intrinsic(prefer_literal=True)
def zero_tile(typing: Any, num_rows: Any, num_columns: Any) -> Any:
    """A float tile of constant numbers of rows and of lanes beside each other."""
    if not all(isinstance(number, types.IntegerLiteral) for number in (num_rows, num_columns)):
        return None
    tile = Tile(True, num_rows.literal_value, num_columns.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(tile), None)

    return tile(num_rows, num_columns), generate


@intrinsic
def columns_of(typing: Any, tile: Any) -> Any:
    """How many lanes a tile has beside each other."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(vector._I64, tile.num_columns)

    return types.int64(tile), generate


@intrinsic
def zero_sums(typing: Any, tile: Any) -> Any:
    """An integer tile of the same size."""
    sums = Tile(False, tile.num_rows, tile.num_columns)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(sums), None)

    return sums(tile), generate


def _add_products(
    builder: Any, tile: Tile, sums: Any, words: list[Any], x: Any, x_pitch: Any, dot: Any
) -> Any:
    for row in range(tile.num_rows):
        x_word = _row_word(builder, x, x_pitch, row)
        for column, word in enumerate(words):
            place = row * tile.num_columns + column
            value = dot(builder, builder.extract_value(sums, place), word, x_word)
            sums = builder.insert_value(sums, value, place)
    return sums


def _dot(product: Any) -> Any:
    @intrinsic
    def dot(typing: Any, sums: Any, w: Any, x: Any, x_pitch: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums_, w_, x_, pitch = arguments
            words = _words(builder, w_, sums)
            return _add_products(builder, signature.return_type, sums_, words, x_, pitch, product)

        return sums(sums, w, x, x_pitch), generate

    return dot


dot_bf16 = _dot(_dot_bfloat)
dot_int8 = _dot(_dot_bytes)


@intrinsic
def dot_bf16_f32(typing: Any, sums: Any, w: Any, x: Any, x_pitch: Any) -> Any:
    """A word of w, two bfloat16, against two float32 of x."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_, w_, x_, pitch = arguments
        halves = zip(*(_widened(builder, word) for word in _words(builder, w_, sums)), strict=True)
        for half, columns in enumerate(halves):
            for row in range(sums.num_rows):
                value = _row_value(builder, _at(builder, x_, 4 * half), pitch, row)
                for column, weights in enumerate(columns):
                    place = row * sums.num_columns + column
                    old = builder.extract_value(sums_, place)
                    operands = (weights, value, old)
                    new = vector._call(builder, "llvm.fma.v16f32", vector._FLOATS, *operands)
                    sums_ = builder.insert_value(sums_, new, place)
        return sums_

    return sums(sums, w, x, x_pitch), generate


@intrinsic
def dot_int4(typing: Any, sums: Any, w: Any, x: Any, x_pitch: Any) -> Any:
    """Two words of x: the first against the low halves of w's bytes, the second the high ones.

    The sums are to be taken from `whole_sums`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_, w_, x_, pitch = arguments
        mask, four = vector._all(vector._INTS, 0x0F0F0F0F), vector._all(vector._INTS, 4)
        words = _words(builder, w_, sums)
        low = [builder.and_(word, mask) for word in words]
        high = [builder.and_(builder.lshr(word, four), mask) for word in words]
        tile = signature.return_type
        sums_ = _add_products(builder, tile, sums_, low, x_, pitch, _dot_nibbles)
        second = _at(builder, x_, WORD_BYTES)
        return _add_products(builder, tile, sums_, high, second, pitch, _dot_nibbles)

    return sums(sums, w, x, x_pitch), generate


@intrinsic
def whole_sums(typing: Any, sums: Any) -> Any:
    """What `dot_int4` has summed up, in up to eight words of w: 16 bits hold no more."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_ = arguments[0]
        if not _SUMS_ARE_PAIRS:
            return sums_
        sixteen = vector._all(vector._INTS, 16)
        for place in range(sums.count):
            pair = builder.extract_value(sums_, place)
            low = builder.ashr(builder.shl(pair, sixteen), sixteen)
            whole = builder.add(low, builder.ashr(pair, sixteen))
            sums_ = builder.insert_value(sums_, whole, place)
        return sums_

    return sums(sums), generate


def _column_values(builder: Any, element: types.Type, address: Any, tile: Tile) -> list[Any]:
    """As many neighbouring elements as a tile has columns, as float lanes."""
    kind = vector._stored_kind(element)
    size = 4 if kind == vector._F32 else 2
    values = []
    for column in range(tile.num_columns):
        start = _at(builder, address, 16 * size * column)
        value = vector._load(builder, start, ir.VectorType(kind, 16), size)
        values.append(value if size == 4 else builder.fpext(value, vector._FLOATS))
    return values


def _row_value(builder: Any, address: Any, pitch: Any, row: int) -> Any:
    value = vector._load(builder, _offset(builder, address, pitch, row), vector._F32, 4)
    return vector._splat(builder, value, vector._FLOATS)


@intrinsic
def add_scaled(
    typing: Any, tile: Any, sums: Any, element: Any, scales: Any, factors: Any, pitch: Any
) -> Any:
    """tile[r, c] + sums[r, c] · scales[c] · factors[r]; a row's factor is `pitch` bytes further."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, sums_, _, scales_, factors_, pitch_ = arguments
        columns = _column_values(builder, signature.args[2], scales_, tile)
        for row in range(tile.num_rows):
            factor = _row_value(builder, factors_, pitch_, row)
            for column, scale in enumerate(columns):
                place = row * tile.num_columns + column
                value = builder.sitofp(builder.extract_value(sums_, place), vector._FLOATS)
                scaled = builder.fmul(value, scale)
                old = builder.extract_value(tile_, place)
                new = vector._call(builder, "llvm.fma.v16f32", vector._FLOATS, scaled, factor, old)
                tile_ = builder.insert_value(tile_, new, place)
        return tile_

    return tile(tile, sums, element, scales, factors, pitch), generate


@intrinsic
def subtract_outer(
    typing: Any, tile: Any, element: Any, columns: Any, factors: Any, pitch: Any
) -> Any:
    """tile[r, c] − columns[c] · factors[r]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, _, columns_, factors_, pitch_ = arguments
        values = _column_values(builder, signature.args[1], columns_, tile)
        for row in range(tile.num_rows):
            factor = builder.fneg(_row_value(builder, factors_, pitch_, row))
            for column, value in enumerate(values):
                place = row * tile.num_columns + column
                old = builder.extract_value(tile_, place)
                new = vector._call(builder, "llvm.fma.v16f32", vector._FLOATS, value, factor, old)
                tile_ = builder.insert_value(tile_, new, place)
        return tile_

    return tile(tile, element, columns, factors, pitch), generate


@intrinsic
def add_weighted(typing: Any, tile: Any, sums: Any, factors: Any, pitch: Any) -> Any:
    """tile[r, c] + sums[r, c] · factors[r]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, sums_, factors_, pitch_ = arguments
        for row in range(tile.num_rows):
            factor = _row_value(builder, factors_, pitch_, row)
            for column in range(tile.num_columns):
                place = row * tile.num_columns + column
                value = builder.sitofp(builder.extract_value(sums_, place), vector._FLOATS)
                old = builder.extract_value(tile_, place)
                new = vector._call(builder, "llvm.fma.v16f32", vector._FLOATS, value, factor, old)
                tile_ = builder.insert_value(tile_, new, place)
        return tile_

    return tile(tile, sums, factors, pitch), generate


@intrinsic
def scale_columns(typing: Any, tile: Any, scales: Any) -> Any:
    """tile[r, c] · scales[c], float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, scales_ = arguments
        columns = _column_values(builder, types.float32, scales_, tile)
        for row in range(tile.num_rows):
            for column, scale in enumerate(columns):
                place = row * tile.num_columns + column
                value = builder.fmul(builder.extract_value(tile_, place), scale)
                tile_ = builder.insert_value(tile_, value, place)
        return tile_

    return tile(tile, scales), generate


@intrinsic
def negative_sums(typing: Any, tile: Any, rows: Any, pitch: Any) -> Any:
    """An integer tile of the size of `tile` that holds −rows[r], int32."""
    sums = Tile(False, tile.num_rows, tile.num_columns)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows_, pitch_ = arguments
        sums_ = ir.Constant(context.get_value_type(sums), None)
        for row in range(tile.num_rows):
            value = builder.neg(_row_word(builder, rows_, pitch_, row))
            for column in range(tile.num_columns):
                sums_ = builder.insert_value(sums_, value, row * tile.num_columns + column)
        return sums_

    return sums(tile, rows, pitch), generate


@intrinsic
def store_tile(typing: Any, element: Any, y: Any, y_pitch: Any, tile: Any) -> Any:
    """Round a tile to its rows of elements, `y_pitch` bytes apart."""
    kind = vector._stored_kind(element)
    size = 4 if kind == vector._F32 else 2

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, y_, pitch, tile_ = arguments
        for row in range(tile.num_rows):
            start = _offset(builder, y_, pitch, row)
            for column in range(tile.num_columns):
                value = builder.extract_value(tile_, row * tile.num_columns + column)
                if size == 2:
                    value = vector._narrowed(builder, value, kind)
                place = _at(builder, start, 16 * size * column)
                builder.store(value, vector._pointer(builder, place, value.type)).align = size
        return context.get_dummy_value()

    return types.void(element, y, y_pitch, tile), generate
