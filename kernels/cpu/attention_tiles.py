"""Products of tiles for attention: keys against queries, weights against values.

As in tiles.py a *word* is four bytes, two neighbouring bfloat16 or one float32, and one instruction
multiplies and adds the words of 16 lanes. `element` (BF16 or F32) says what a word holds.

    q · Kᵀ, many queries   sums[key, query]     lanes are queries, a key's word goes to all lanes
    q · Kᵀ, few queries    sums[key, query]     lanes are words of both; `fold` adds them up
    P V                    sums[query, value]   lanes are values, a weight's word goes to all lanes

A word of P V holds neighbouring keys, so two rows of V are laced together as they are read.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bezel.kernels.cpu import lanes as vector
from bezel.kernels.cpu.lanes import LANES, Tile, has_feature

NUM_COLUMNS = 4  # lanes of values next to each other
VALUE_BLOCK = NUM_COLUMNS * LANES
WORD_BYTES, LANE_BYTES = 4, 64

_BFLOATS = ir.VectorType(vector._BFloat(), 32)


def _at(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, ir.Constant(vector._I64, num_bytes))


def _fma(builder: Any, left: Any, right: Any, sums: Any) -> Any:
    return vector._call(builder, "llvm.fma.v16f32", vector._FLOATS, left, right, sums)


def _halves(builder: Any, words: Any) -> tuple[Any, Any]:
    """The two bfloat16 of words, as float lanes."""
    bits = builder.bitcast(words, vector._INTS)
    low = builder.shl(bits, vector._all(vector._INTS, 16))
    high = builder.and_(bits, vector._all(vector._INTS, 0xFFFF0000))
    return builder.bitcast(low, vector._FLOATS), builder.bitcast(high, vector._FLOATS)


def _dot(builder: Any, element: Any, sums: Any, left: Any, right: Any) -> Any:
    """sums + left · right, word by word; words are carried as float lanes."""
    if element == types.float32:
        return _fma(builder, left, right, sums)
    if has_feature("avx512bf16"):
        operands = (builder.bitcast(left, _BFLOATS), builder.bitcast(right, _BFLOATS))
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return vector._call(builder, name, vector._FLOATS, sums, *operands)
    for a, b in zip(_halves(builder, left), _halves(builder, right), strict=True):
        sums = _fma(builder, a, b, sums)
    return sums


def _lanes_at(builder: Any, address: Any) -> Any:
    return vector._load(builder, address, vector._FLOATS, 4)


def _word_at(builder: Any, address: Any) -> Any:
    """One word for all lanes."""
    word = vector._load(builder, address, vector._F32, 4)
    return vector._splat(builder, word, vector._FLOATS)


def _address_at(builder: Any, address: Any, index: int) -> Any:
    """The address in a list of addresses."""
    return vector._load(builder, _at(builder, address, 8 * index), vector._I64, 8)


def _pieces(builder: Any, tile: Tile, value: Any) -> list[Any]:
    if tile.count == 1:
        return [value]
    return [builder.extract_value(value, i) for i in range(tile.count)]


def _tile(builder: Any, tile: Tile, pieces: list[Any]) -> Any:
    if tile.count == 1:
        return pieces[0]
    value = ir.Constant(ir.ArrayType(tile.lanes, tile.count), ir.Undefined)
    for i, piece in enumerate(pieces):
        value = builder.insert_value(value, piece, i)
    return value


def _shuffled(builder: Any, left: Any, right: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(left, right, ir.Constant(vector._INTS, order))


def _add_outer(builder: Any, element: Any, tile: Tile, sums: Any, rows: Any, columns: Any) -> Any:
    """sums[r, c] + rows[r] · columns[c]."""
    old = _pieces(builder, tile, sums)
    new = [
        _dot(builder, element, old[r * len(columns) + c], row, column)
        for r, row in enumerate(rows)
        for c, column in enumerate(columns)
    ]
    return _tile(builder, tile, new)


@intrinsic(prefer_literal=True)
def zeros(typing: Any, num_rows: Any, num_columns: Any) -> Any:
    """A float tile of a constant size."""
    if not all(isinstance(n, types.IntegerLiteral) for n in (num_rows, num_columns)):
        return None
    tile = Tile(True, num_rows.literal_value, num_columns.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(tile), None)

    return tile(num_rows, num_columns), generate


@intrinsic
def add_word_products(
    typing: Any, element: Any, sums: Any, rows: Any, offset: Any, columns: Any
) -> Any:
    """Add a word of each row to all lanes of its sums, times the columns' words.

    `rows` is the address of a list of addresses; the word stands `offset` bytes further in each.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, sums_, rows_, offset_, columns_ = arguments
        words = [
            _word_at(builder, builder.add(_address_at(builder, rows_, r), offset_))
            for r in range(sums.num_rows)
        ]
        lanes = [
            _lanes_at(builder, _at(builder, columns_, LANE_BYTES * c))
            for c in range(sums.num_columns)
        ]
        return _add_outer(builder, element, sums, sums_, words, lanes)

    return sums(element, sums, rows, offset, columns), generate


@intrinsic
def add_lane_products(
    typing: Any, element: Any, sums: Any, rows: Any, columns: Any, offset: Any
) -> Any:
    """Add 16 words of each row times those of each column, lane by lane; both are lists."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, sums_, rows_, columns_, offset_ = arguments
        left, right = (
            [
                _lanes_at(builder, builder.add(_address_at(builder, addresses, i), offset_))
                for i in range(count)
            ]
            for addresses, count in ((rows_, sums.num_rows), (columns_, sums.num_columns))
        )
        return _add_outer(builder, element, sums, sums_, left, right)

    return sums(element, sums, rows, columns, offset), generate


@intrinsic
def add_value_products(typing: Any, element: Any, sums: Any, weights: Any, values: Any) -> Any:
    """Add the words of neighbouring weights, one a row, times the values' words."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, sums_, weights_, values_ = arguments
        words = [
            _word_at(builder, _at(builder, weights_, WORD_BYTES * r)) for r in range(sums.num_rows)
        ]
        return _add_outer(builder, element, sums, sums_, words, _pieces(builder, values, values_))

    return sums(element, sums, weights, values), generate


@intrinsic
def load_words(typing: Any, tile: Any, address: Any, pitch: Any) -> Any:
    """A tile like `tile` from memory; its rows are `pitch` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address_, pitch_ = arguments
        pieces = []
        for r in range(tile.num_rows):
            row = builder.add(address_, builder.mul(pitch_, ir.Constant(vector._I64, r)))
            pieces += [
                _lanes_at(builder, _at(builder, row, LANE_BYTES * c))
                for c in range(tile.num_columns)
            ]
        return _tile(builder, tile, pieces)

    return tile(tile, address, pitch), generate


@intrinsic
def store_words(typing: Any, tile: Any, address: Any, pitch: Any) -> Any:
    """Store a tile; its rows are `pitch` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, address_, pitch_ = arguments
        for i, piece in enumerate(_pieces(builder, tile, tile_)):
            r, c = divmod(i, tile.num_columns)
            row = builder.add(address_, builder.mul(pitch_, ir.Constant(vector._I64, r)))
            pointer = vector._pointer(builder, _at(builder, row, LANE_BYTES * c), vector._FLOATS)
            builder.store(piece, pointer).align = 4
        return context.get_dummy_value()

    return types.void(tile, address, pitch), generate


@intrinsic
def add_tiles(typing: Any, left: Any, right: Any) -> Any:
    """left + right."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pairs = zip(*(_pieces(builder, left, tile) for tile in arguments), strict=True)
        return _tile(builder, left, [builder.fadd(a, b) for a, b in pairs])

    return left(left, right), generate


@intrinsic
def scale_rows(typing: Any, tile: Any, factors: Any) -> Any:
    """tile[r] · factors[r], float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_, factors_ = arguments
        scaled = []
        for i, piece in enumerate(_pieces(builder, tile, tile_)):
            address = _at(builder, factors_, WORD_BYTES * (i // tile.num_columns))
            scaled.append(builder.fmul(piece, _word_at(builder, address)))
        return _tile(builder, tile, scaled)

    return tile(tile, factors), generate


@intrinsic
def lace(typing: Any, element: Any, even: Any, odd: Any) -> Any:
    """64 words of neighbouring values from two rows of V; in float32 the first row is all."""
    tile = Tile(True, 1, NUM_COLUMNS)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, even_, odd_ = arguments
        if element == types.float32:
            return _tile(
                builder,
                tile,
                [_lanes_at(builder, _at(builder, even_, LANE_BYTES * c)) for c in range(4)],
            )
        pieces = []
        shorts = ir.VectorType(vector._I16, 32)
        for half in range(2):
            rows = [
                vector._load(builder, _at(builder, row, LANE_BYTES * half), shorts, 2)
                for row in (even_, odd_)
            ]
            for first in (0, 16):
                order = [first + i // 2 + 32 * (i % 2) for i in range(32)]
                laced = builder.shuffle_vector(
                    *rows, ir.Constant(ir.VectorType(vector._I32, 32), order)
                )
                pieces.append(builder.bitcast(laced, vector._FLOATS))
        return _tile(builder, tile, pieces)

    return tile(element, even, odd), generate


@intrinsic
def fold(typing: Any, tile: Any) -> Any:
    """Sums over the lanes of each of a tile's 16 places, as lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Halving: sums of one half of the lanes stay where they are, those of the other half come
        # from a neighbour, until every lane belongs to one place.
        pieces = _pieces(builder, tile, arguments[0])
        step = LANES // 2
        while step:
            kept = [i - step + LANES if i & step else i for i in range(LANES)]
            moved = [i + LANES if i & step else i + step for i in range(LANES)]
            half = len(pieces) // 2
            pieces = [
                builder.fadd(_shuffled(builder, a, b, kept), _shuffled(builder, a, b, moved))
                for a, b in zip(pieces[:half], pieces[half:], strict=True)
            ]
            step //= 2
        return pieces[0]

    return Tile(True)(tile), generate


@intrinsic
def store_word(typing: Any, address: Any, source: Any) -> Any:
    """Copy one word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = vector._load(builder, arguments[1], vector._I32, 4)
        builder.store(word, vector._pointer(builder, arguments[0], vector._I32)).align = 4
        return context.get_dummy_value()

    return types.void(address, source), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for a cache line that is going to be read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = vector._pointer(builder, arguments[0], vector._I8)
        kinds = [pointer.type, vector._I32, vector._I32, vector._I32]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0"
        )
        # To be read, into the second-level cache, as data.
        builder.call(function, [pointer, *(ir.Constant(vector._I32, n) for n in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(address), generate
