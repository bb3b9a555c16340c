"""The decode attention kernels, interpreted: values, every byte they move, and bugs put into them.

Whatever a kernel has no business to read is NaN, and entries of page tables that lead nowhere are
-1, so a page read by mistake is an access out of bounds.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, Watch, watched
from torch import Tensor

from bezel.kernels import decode_attention as module
from bezel.kernels import decode_combine
from bezel.kernels.decode_combine import Splits
from bezel.kernels.decode_reference import decode_attention_reference
from bezel.kernels.jit import triton_on_cpu

SCALE = 0.3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-2}
NUM_LAYERS, LAYER = 3, 1


@dataclasses.dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    value_dim: int
    turned: int = 0  # > 0: keys are packed
    page_size: int = 8
    window: int | None = None
    q_len: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return self.value_dim + self.turned

    @property
    def splits(self) -> Splits:
        num_rows = self.q_len * self.num_heads // self.num_kv_heads
        return Splits.of(
            num_rows, self.num_kv_heads, self.value_dim, self.turned, self.window, self.q_len
        )

    def first(self, length: int) -> int:
        """The first position that a query of a sequence sees."""
        return 0 if self.window is None else max(0, length - self.q_len + 1 - self.window)

    def live_bytes(self, lengths: list[int]) -> int:
        """Bytes of the keys and values that queries see."""
        values = self.num_kv_heads * (self.width if self.turned else 2 * self.width)
        return sum(n - self.first(n) for n in lengths) * values * self.dtype.itemsize


class Case:
    """Sequences of given lengths whose live keys and values lie in pages in random order."""

    def __init__(self, shape: Shape, lengths: list[int], num_entries: int = 0) -> None:
        self.shape, self.lengths = shape, lengths
        self.generator = torch.Generator().manual_seed(len(lengths) + shape.num_heads)
        size, parts = shape.page_size, 1 if shape.turned else 2
        num_entries = max(num_entries, 1, *(-(-n // size) for n in lengths))
        if shape.window is not None:
            num_entries = 1 << (-(-(shape.window + shape.q_len - 1) // size)).bit_length()
        self.page_table_SP = torch.full((len(lengths), num_entries), -1)
        live = [self.live_pages(n) for n in lengths]
        ids = torch.randperm(sum(map(len, live)), generator=self.generator).tolist()
        rows = (parts, size, shape.num_kv_heads, shape.width)
        arena = torch.full((len(ids) + 1, NUM_LAYERS, *rows), torch.nan, dtype=shape.dtype)
        self.caches = [arena[:, LAYER, part] for part in range(parts)]
        for row, (length, pages) in enumerate(zip(lengths, live, strict=True)):
            for page in pages:
                self.page_table_SP[row, page % num_entries] = ids.pop()
            self.fill(row, length)
        self.seq_lens_S = torch.tensor(lengths)
        self.q_THC = self.random(len(lengths) * shape.q_len, shape.num_heads, shape.width)

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.shape.dtype)

    def live_pages(self, length: int) -> range:
        size = self.shape.page_size
        return range(self.shape.first(length) // size, -(-length // size))

    def fill(self, row: int, length: int) -> None:
        size, num_entries = self.shape.page_size, self.page_table_SP.shape[1]
        for page in self.live_pages(length):
            start, stop = max(self.shape.first(length), page * size), min(length, (page + 1) * size)
            page_id = self.page_table_SP[row, page % num_entries]
            for cache in self.caches:
                values = self.random(stop - start, self.shape.num_kv_heads, self.shape.width)
                values *= 1 + stop / length  # scores rise, so running maxima do too
                cache[page_id, start - page * size : stop - page * size] = values

    def call(self, attention: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Tensor:
        k_cache, v_cache = self.caches[0], None if self.shape.turned else self.caches[1]
        return attention(
            self.q_THC.to(dtype),
            k_cache.to(dtype) if dtype else k_cache,
            v_cache.to(dtype) if dtype and v_cache is not None else v_cache,
            self.page_table_SP,
            self.seq_lens_S,
            SCALE,
            self.shape.window,
            self.shape.value_dim,
            self.shape.q_len,
        )

    def run(
        self, attention: ModuleType = module, architecture: str = "sm_90"
    ) -> tuple[Tensor, Watch]:
        names = {"q": self.q_THC, "k": self.caches[0], "v": self.caches[-1]}
        with watched(names) as watch, triton_on_cpu(architecture):
            out_THK = self.call(attention.decode_attention)
        assert watch.unwritten(out_THK) == 0
        return out_THK, watch

    def check(self, attention: ModuleType = module, architecture: str = "sm_90") -> Watch:
        """Compare with the reference in float64."""
        out_THK, watch = self.run(attention, architecture)
        assert out_THK.dtype == self.shape.dtype
        expected_THK = self.call(decode_attention_reference, torch.float64)
        tolerance = TOLERANCE[self.shape.dtype]
        torch.testing.assert_close(out_THK.double(), expected_THK, atol=tolerance, rtol=tolerance)
        return watch

    def row(self, row: int) -> "Case":
        """One sequence alone, with a table no wider than it needs."""
        alone, q_len = object.__new__(Case), self.shape.q_len
        alone.shape, alone.lengths, alone.caches = self.shape, [self.lengths[row]], self.caches
        num_entries = self.page_table_SP.shape[1]
        if self.shape.window is None:
            num_entries = max(1, len(self.live_pages(self.lengths[row])))
        alone.page_table_SP = self.page_table_SP[row : row + 1, :num_entries].contiguous()
        alone.seq_lens_S = self.seq_lens_S[row : row + 1].contiguous()
        alone.q_THC = self.q_THC[row * q_len : (row + 1) * q_len].contiguous()
        return alone


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Lengths at the edges of pages, splits and windows; some sequences of length 0."""
    group = draw(st.sampled_from([1, 2, 4, 8, 16]))
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    value_dim = draw(st.sampled_from([12, 16, 24, 32]))
    turned = draw(st.sampled_from([0, 0, 4, 16, 20]))
    window = None if turned else draw(st.sampled_from([None, 1, 7, 16, 30, 130, 600]))
    page_size = draw(st.sampled_from([8, 16, 32, 64]))
    q_len = draw(st.integers(1, 8))
    shape = Shape(
        group * num_kv_heads,
        num_kv_heads,
        value_dim,
        turned,
        page_size,
        window,
        q_len,
        draw(st.sampled_from(list(TOLERANCE))),
    )
    edges = {page_size, 2 * page_size, window or 1, 2 * (window or 1), q_len}
    edges |= {n for n in (2 * shape.splits.min_len, 3 * shape.splits.min_len) if n < 1300}
    near = sorted(n for edge in edges for n in range(edge - 1, edge + 2) if n >= q_len)
    length = st.one_of(st.just(0), st.sampled_from(near), st.integers(q_len, 600))
    return Case(shape, draw(st.lists(length, min_size=1, max_size=7)), draw(st.integers(0, 40)))


@settings(max_examples=15, deadline=None)
@given(cases())
def test_values(case: Case) -> None:
    case.check()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(32, 16, 256, page_size=16, window=40),  # 12B, 26B and 31B, local
        Shape(8, 2, 256, page_size=16, window=40),  # E4B
        Shape(8, 1, 256, page_size=16, window=40, q_len=3),  # E2B
        Shape(8, 2, 512, page_size=64),
        Shape(8, 1, 512, page_size=64, q_len=3),
        Shape(32, 4, 512, 128, page_size=64),  # 31B, global
        Shape(16, 1, 512, 128, page_size=64, q_len=2),  # 12B
        Shape(16, 1, 512, 128, page_size=64, q_len=4),
        Shape(8, 1, 512, page_size=64, q_len=8),
        Shape(8, 1, 256, page_size=16, window=40, q_len=8),
    ],
    ids=str,
)
def test_widths_of_models_with_the_tiles_of_each_architecture(
    architecture: str, shape: Shape
) -> None:
    shape = dataclasses.replace(shape, dtype=torch.bfloat16)
    Case(shape, [70, 0, 17]).check(architecture=architecture)


@pytest.mark.parametrize("length", [64 * 128, 64 * 150 + 1])
def test_long_sequences_whose_splits_grow(length: int) -> None:
    """64 splits of 128 positions, 64 longer ones, and shorter sequences beside them."""
    Case(Shape(1, 1, 16, 16, page_size=64), [1, length, 1000]).check()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(8, 2, 32, 16, page_size=16),
        Shape(4, 2, 16, page_size=16, q_len=3),
        Shape(4, 2, 16, page_size=16, window=450, q_len=2),
        Shape(4, 1, 16, page_size=16, window=40),
    ],
    ids=str,
)
def test_output_is_bit_equal_alone_and_in_any_batch(shape: Shape) -> None:
    check_batch_invariance(shape)


def check_batch_invariance(shape: Shape, attention: ModuleType = module) -> None:
    case = Case(shape, [200, 3, 640, 1100, 0, 257], num_entries=700)
    together_THK, _ = case.run(attention)
    for row in range(len(case.lengths)):
        alone_THK, _ = case.row(row).run(attention)
        start = row * shape.q_len
        assert torch.equal(alone_THK, together_THK[start : start + shape.q_len]), row


def test_idle_rows_are_zero_and_read_nothing() -> None:
    for shape in (Shape(4, 2, 16, window=20), Shape(4, 2, 32, 16, q_len=2)):
        out_THK, watch = Case(shape, [0, 0, 0], num_entries=200).run()
        assert out_THK.abs().sum() == 0
        assert watch.by_name["k"].loaded == watch.by_name["v"].loaded == 0


def test_no_sequences() -> None:
    case = Case(Shape(4, 2, 16), [5])
    case.q_THC, case.page_table_SP = case.q_THC[:0], case.page_table_SP[:0]
    case.seq_lens_S = case.seq_lens_S[:0]
    out_THK, watch = case.run()
    assert out_THK.shape == (0, 4, 16) and watch.num_launches == 0


def far_pages(page_size: int) -> Case:
    """A sequence with a page 2³¹ values into the cache. Only memory that is used is taken."""
    shape = Shape(4, 2, 32, 16, page_size=page_size, dtype=torch.bfloat16)
    case = Case(shape, [2 * page_size + 5])
    near_PBGC, stride_page = case.caches[0], 1 << 30
    page = page_size * shape.num_kv_heads * shape.width
    far = torch.empty(2 * stride_page + page, dtype=shape.dtype)
    far_PBGC = far.as_strided((3, *near_PBGC.shape[1:]), (stride_page, *near_PBGC.stride()[1:]))
    case.caches = [far_PBGC.copy_(near_PBGC[:3])]
    return case


@pytest.mark.parametrize("page_size", [16, 32])
def test_a_cache_of_more_than_4_gib(page_size: int) -> None:
    far_pages(page_size).check()


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        (Shape(8, 2, 16, page_size=16), [129, 1, 700]),
        (Shape(16, 1, 16, 16, page_size=64), [129, 1, 2000]),
        (Shape(4, 2, 16, page_size=16, window=300), [129, 1, 700]),
        (Shape(4, 2, 16, page_size=8, window=900, q_len=4), [129, 4, 1300]),
        (Shape(16, 1, 16, 16, page_size=64, q_len=4, dtype=torch.bfloat16), [129, 4, 4200]),
    ],
    ids=str,
)
def test_keys_and_values_are_read_once(shape: Shape, lengths: list[int]) -> None:
    watch = Case(shape, lengths, num_entries=100).check()
    loaded = sum(watch.by_name[name].loaded for name in ("k", "v") if name in watch.by_name)
    assert loaded == shape.live_bytes(lengths)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(16, 1, 128, 32, page_size=64),
        Shape(8, 1, 128, page_size=64),
        Shape(8, 2, 128, page_size=64, q_len=4),
        Shape(4, 2, 256, page_size=16, window=1024),
        Shape(4, 2, 256, page_size=16, window=1024, q_len=4),
    ],
    ids=str,
)
def test_parts_cost_a_twentieth_of_the_keys_and_values(shape: Shape) -> None:
    check_cost(dataclasses.replace(shape, dtype=torch.bfloat16))


def check_cost(shape: Shape, attention: ModuleType = module) -> None:
    length = 4500
    assert shape.splits.most(length) > 1
    case = Case(shape, [length])
    out_THK, watch = case.run(attention)
    minimum = shape.live_bytes([length]) + case.q_THC.nbytes + out_THK.nbytes
    assert watch.bytes_loaded + watch.bytes_stored < 1.05 * minimum


def check_work(attention: ModuleType = module) -> None:
    """Positions before a window take no time."""
    shape = Shape(2, 2, 16, page_size=16, window=300)
    flops = [Case(shape, [length]).run(attention)[1].dot_flops for length in (512, 512 + 3200)]
    assert flops[0] == flops[1]


def test_work_depends_on_the_window_only() -> None:
    check_work()
    with (
        mutated(module, "first_block = first // BLOCK_N", "first_block = 0") as attention,
        pytest.raises(AssertionError),
    ):
        check_work(attention)


def test_splits_shorter_than_they_should_be_are_noticed() -> None:
    with (
        with_bug(decode_combine, "-20 * added", "-10 * added") as attention,
        pytest.raises(AssertionError),
    ):
        check_cost(Shape(16, 1, 128, 32, page_size=64, dtype=torch.bfloat16), attention)


def test_a_sequence_of_one_split_writes_no_parts() -> None:
    watch = Case(Shape(4, 2, 16), [255, 5, 0], num_entries=100).check()
    assert watch.bytes_stored == 3 * 4 * 16 * 4
    assert "part_o_ptr" not in watch.by_name or watch.by_name["part_o_ptr"].stored == 0


def test_many_rows_still_leave_a_program_for_every_2048_positions() -> None:
    for num_kv_heads in (1, 2, 4):
        rule = Splits.of(128, num_kv_heads, 512, 128, None, 8)
        assert rule.most(1 << 14) * num_kv_heads == 8


@pytest.mark.parametrize("num_rows", [1, 8, 16, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_the_grid_has_room_for_every_split(num_rows: int, num_kv_heads: int) -> None:
    rule = Splits.of(num_rows, num_kv_heads, 512, 128, None, 1)
    counts = [num_splits(rule, n) for n in range(1, 300_000, 7)]
    for n, most_so_far in zip(range(1, 300_000, 7), running_maximum(counts), strict=True):
        assert most_so_far <= rule.most(n) <= rule.max_count
    assert max(counts) == rule.most(300_000)


@pytest.mark.parametrize("q_len", [1, 2, 8])
@pytest.mark.parametrize("window", [1, 8, 127, 128, 129, 255, 256, 512, 1024])
def test_the_grid_has_room_for_every_split_of_a_window(window: int, q_len: int) -> None:
    rule = Splits.of(2, 2, 256, 0, window, q_len)
    assert rule.most(9999) == max(num_splits(rule, n) for n in range(q_len, 3000))


def num_splits(rule: Splits, length: int) -> int:
    first = max(0, length - rule.q_len + 1 - rule.window) if rule.window else 0
    return max(1, min((length - first) // rule.min_len, rule.max_count))


def running_maximum(values: list[int]) -> Iterator[int]:
    highest = 0
    for value in values:
        highest = max(highest, value)
        yield highest


STANDARD = [
    lambda: Case(Shape(6, 2, 12, page_size=8, window=30, dtype=torch.bfloat16), [5, 31, 200]),
    lambda: Case(Shape(2, 2, 16, page_size=32, window=280, q_len=3), [3, 129, 504, 700]),
    lambda: Case(Shape(4, 2, 24, 20, page_size=32, q_len=2), [0, 2, 600], num_entries=20),
    lambda: Case(Shape(20, 1, 16, page_size=16), [1, 40]),
    lambda: Case(Shape(2, 2, 16, page_size=32), [1300, 70]),
    lambda: far_pages(16),
    lambda: far_pages(32),
]

ATTEND_BUGS = [
    ("rows beyond the head's are stored", "m_m = i_m < ROWS", "m_m = i_m >= 0"),
    (
        "stride between splits is wrong",
        "(tl.num_programs(2) * Q_LEN * NUM_HEADS)",
        "(tl.num_programs(2) * NUM_HEADS)",
    ),
    ("output isn't rescaled", "acc=b_o * b_rescale[:, None]", "acc=b_o"),
    ("sum isn't rescaled", "b_sum * b_rescale + tl.sum", "b_sum + tl.sum"),
    (
        "splits overlap",
        "// num_live) * BLOCK_N\n    end = tl.min",
        "// num_live + 1) * BLOCK_N\n    end = tl.min",
    ),
    (
        "splits leave gaps",
        "// num_live) * BLOCK_N\n    end = tl.min",
        "// num_live - 1) * BLOCK_N\n    end = tl.min",
    ),
    ("the last block is missed", "tl.cdiv(seq_len, BLOCK_N) - first", "seq_len // BLOCK_N - first"),
    ("row blocks are all the first", "% ROW_BLOCKS * BLOCK_M", "% ROW_BLOCKS * 0"),
    (
        "row blocks are taken for splits",
        "i_split = tl.program_id(0) // ROW_BLOCKS",
        "i_split = tl.program_id(0)",
    ),
    (
        "page offsets have 32 bits",
        "return b_page * stride_page + start",
        "return b_page.to(tl.int32) * stride_page + start",
    ),
    (
        "page offsets have 32 bits, pages shorter than blocks",
        "return b_page * stride_page + (start",
        "return b_page.to(tl.int32) * stride_page + (start",
    ),
    (
        "unseen blocks are not a number",
        'tl.where(b_new_max == float("-inf"), 0.0, b_new_max)',
        "b_new_max",
    ),
    (
        "packed rows aren't masked",
        "b_v = tl.load(v_ptr + o_kv + o_v[None, :], mask=m_nv, other=0.0)\n            b_s",
        "b_v = tl.load(v_ptr + o_kv + o_v[None, :])\n            b_s",
    ),
    (
        "values aren't masked",
        "b_v = tl.load(v_ptr + o_kv + o_v[None, :], mask=m_nv, other=0.0)\n        m_mn",
        "b_v = tl.load(v_ptr + o_kv + o_v[None, :])\n        m_mn",
    ),
    ("positions before the window are read", "(o_n >= first) & (o_n < end)", "o_n < end"),
    ("ring is taken for a list", "entries = entries % RING", "entries = entries"),
    (
        "drafted tokens see later ones",
        "m_mn & (o_n[None, :] <= position_m[:, None])",
        "m_mn & (o_n[None, :] < seq_len)",
    ),
    (
        "drafted tokens see beyond their window",
        "m_mn & (o_n[None, :] > position_m[:, None] - WINDOW)",
        "m_mn & (o_n[None, :] >= first)",
    ),
    ("queries stand one position off", "seq_len - Q_LEN + i_m", "seq_len - Q_LEN - 1 + i_m"),
    (
        "page ids aren't moved on",
        "_page_ids(table_ptr, start + BLOCK_N, end",
        "_page_ids(table_ptr, start, end",
    ),
    (
        "page ids are read beyond the end",
        "return tl.load(table_ptr + entries, mask=o_n < end, other=0)",
        "return tl.load(table_ptr + entries)",
    ),
    ("turned part isn't added", "acc=b_s, input_precision", "input_precision"),
    ("heads and queries change places", "i_s * Q_LEN + i_m // GROUP", "i_s * Q_LEN + i_m % Q_LEN"),
    ("idle rows are 0 / 0", "b_o / tl.where(b_sum == 0.0, 1.0, b_sum)", "b_o / (b_sum)"),
    ("idle splits are computed", "if i_split >= num_live:\n        return", "pass"),
    ("maximum isn't kept", "        b_max = b_new_max\n", ""),
    ("columns beyond the width are read", "m_v = o_v < VALUE_DIM", "m_v = o_v >= 0"),
    ("turned columns beyond the width are read", "m_r = o_r < TURNED", "m_r = o_r >= 0"),
]

COMBINE_BUGS = [
    ("window one too wide", "seq_len - Q_LEN + 1 - WINDOW", "seq_len - Q_LEN - WINDOW"),
    ("window one too narrow", "seq_len - Q_LEN + 1 - WINDOW", "seq_len - Q_LEN + 2 - WINDOW"),
    ("one split too many", "// MIN_LEN, MAX_COUNT), 1)", "// MIN_LEN, MAX_COUNT), 1) + 1"),
    (
        "a sequence of length 0 has no split",
        "// MIN_LEN, MAX_COUNT), 1)",
        "// MIN_LEN, MAX_COUNT), 0)",
    ),
    ("splits of the whole sequence", "(seq_len - first) // MIN_LEN", "seq_len // MIN_LEN"),
    ("parts beyond the last are added", "m_p = i_split < num_live", "m_p = i_split >= 0"),
    ("output isn't rescaled", "b_o * b_rescale", "b_o"),
    ("sum isn't rescaled", "b_sum * b_rescale", "b_sum"),
    ("parts have equal weights", "b_weight[:, None] * b_part", "b_part"),
    ("single splits are combined", "if num_live == 1:\n        return", "pass"),
    ("lengths of other sequences", "seq_lens_ptr + i_t // Q_LEN", "seq_lens_ptr + i_t * 0"),
    ("columns beyond the width are stored", "m_v = o_v < VALUE_DIM", "m_v = o_v >= 0"),
]


@contextmanager
def with_bug(mutant_of: ModuleType, old: str, new: str) -> Iterator[ModuleType]:
    """Decode attention with a bug in one of its two modules."""
    with mutated(mutant_of, old, new) as mutant:
        if mutant_of is module:
            yield mutant
        else:
            with mutated(module, mutant_of.__name__, mutant.__name__) as attention:
                yield attention


@pytest.mark.parametrize(
    ("mutant_of", "old", "new"),
    [
        pytest.param(mutant_of, old, new, id=name)
        for mutant_of, bugs in ((module, ATTEND_BUGS), (decode_combine, COMBINE_BUGS))
        for name, old, new in bugs
    ],
)
def test_bugs_are_noticed(mutant_of: ModuleType, old: str, new: str) -> None:
    with with_bug(mutant_of, old, new) as attention, pytest.raises((KernelBug, AssertionError)):
        for make_case in STANDARD:
            make_case().check(attention)


def test_a_split_length_that_the_batch_determines_is_noticed() -> None:
    with (
        mutated(module, "Splits.of(rows,", "Splits.of(rows * num_seqs,") as attention,
        pytest.raises(AssertionError),
    ):
        check_batch_invariance(Shape(4, 2, 16, page_size=16), attention)


def test_standard_cases_pass() -> None:
    for make_case in STANDARD:
        make_case().check()
