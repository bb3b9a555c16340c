"""The prefill attention kernels, interpreted: values, every byte they move, and bugs put into them.

Whatever a kernel has no business to read is NaN, and entries of page tables that lead nowhere are
-1, so a page read by mistake is an access out of bounds.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, Watch, watched
from torch import Tensor

from bezel.kernels import prefill_attention as module
from bezel.kernels import prefill_kernels
from bezel.kernels.jit import triton_on_cpu

SCALE = 0.3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-2}
NUM_LAYERS, LAYER = 3, 1
Span = tuple[int, int]  # positions [start, end)


@dataclasses.dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    value_dim: int
    turned: int = 0  # > 0: keys are packed
    page_size: int = 8
    window: int | None = None  # None: a global layer
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return self.value_dim + self.turned


class Case:
    """Chunks whose past (and on global layers, whose own keys) lie in pages in random order.

    Sequence i is always the same for one `length`, whatever chunk of it is computed; `seeds` picks
    others than the first ones. The tokens of an image in a chunk see it to its end.
    """

    def __init__(
        self,
        shape: Shape,
        chunks: Sequence[Span],
        images: Sequence[Span] = (),
        seeds: Sequence[int] = (),
        length: int = 0,
    ) -> None:
        self.shape, self.chunks = shape, chunks
        length = max([length, *(end for _, end in chunks)])
        seeds = seeds or range(len(chunks))
        whole = [self._sequence(length, seed) for seed in seeds[: len(chunks)]]
        self.q_THC, self.k_TGC, v_TGC = (self._fresh(whole, part) for part in range(3))
        self.v_TGC = with_gaps(v_TGC)
        self._fill_pages(whole)
        lengths = torch.tensor([0, *(end - start for start, end in chunks)])
        self.cu_seqlens_q_S1 = lengths.cumsum(0)
        self.max_q_len = int(lengths.max())
        self.seq_lens_S = torch.tensor([end for _, end in chunks], dtype=torch.int64)
        self.last_key_T = None
        if images:
            self.last_key_T = torch.cat([last_keys(chunk, images) for chunk in chunks])

    def _sequence(self, length: int, seed: int) -> list[Tensor]:
        """Queries, keys and values of one sequence."""
        generator, shape = torch.Generator().manual_seed(seed), self.shape
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        return [
            torch.randn(length, num, shape.width, generator=generator).to(shape.dtype)
            for num in heads
        ]

    def _fresh(self, whole: list[list[Tensor]], part: int) -> Tensor:
        """Queries, keys or values of all chunks."""
        none = self._sequence(0, 0)[part]
        chunks = zip(whole, self.chunks, strict=True)
        return torch.cat([none, *(sequence[part][start:end] for sequence, (start, end) in chunks)])

    def _fill_pages(self, whole: list[list[Tensor]]) -> None:
        shape, size = self.shape, self.shape.page_size
        stored = [self.stored(chunk) for chunk in self.chunks]
        num_entries = max([1, *(-(-positions.stop // size) for positions in stored)])
        if shape.window is not None:
            num_entries = 1 << (-(-shape.window // size)).bit_length()
        self.page_table_SP = torch.full((len(stored), num_entries), -1)
        pages = [range(x.start // size, -(-x.stop // size)) if x else range(0) for x in stored]
        generator = torch.Generator().manual_seed(len(stored))
        # Page 0, which masked lanes point at, is nobody's.
        ids = (torch.randperm(sum(map(len, pages)), generator=generator) + 1).tolist()
        parts = 1 if shape.turned else 2
        rows = (parts, size, shape.num_kv_heads, shape.width)
        arena = torch.full((len(ids) + 1, NUM_LAYERS, *rows), torch.nan, dtype=shape.dtype)
        self.caches = [arena[:, LAYER, part] for part in range(parts)]
        for row, (positions, sequence) in enumerate(zip(stored, whole, strict=True)):
            for page in pages[row]:
                self.page_table_SP[row, page % num_entries] = ids.pop()
            for position in positions:
                page_id = self.page_table_SP[row, position // size % num_entries]
                for cache, values in zip(self.caches, sequence[1:], strict=False):
                    cache[page_id, position % size] = values[position]

    def stored(self, chunk: Span) -> range:
        """Positions that pages hold."""
        if self.shape.window is None:
            return range(chunk[1])
        return range(max(0, chunk[0] - self.shape.window + 1), chunk[0])

    def call(
        self, local: Callable[..., Tensor], global_: Callable[..., Tensor], *max_q_len: int
    ) -> Tensor:
        """Attention by wrappers (which are told `max_q_len`) or by references (in float64)."""

        def exact(x: Tensor) -> Tensor:
            return x if max_q_len else x.double()

        extents = (self.page_table_SP, self.cu_seqlens_q_S1, self.seq_lens_S, *max_q_len, SCALE)
        q, k, v = exact(self.q_THC), exact(self.k_TGC), exact(self.v_TGC)
        caches = [exact(cache) for cache in self.caches]
        if self.shape.window is not None:
            return local(q, k, v, *caches, *extents, self.shape.window, self.last_key_T)
        v_cache = None if self.shape.turned else caches[1]
        return global_(q, caches[0], v_cache, *extents, self.shape.value_dim)

    def run(self, architecture: str = "sm_90") -> tuple[Tensor, Watch]:
        names = {"q": self.q_THC, "k": self.k_TGC, "v": self.v_TGC}
        names |= dict(zip(("k_cache", "v_cache"), self.caches, strict=False))
        with watched(names) as watch, triton_on_cpu(architecture):
            out_THK = self.call(
                module.local_prefill_attention, module.global_prefill_attention, self.max_q_len
            )
        assert watch.unwritten(out_THK) == 0
        return out_THK, watch

    def check(self, architecture: str = "sm_90") -> Watch:
        """Compare with the reference in float64."""
        out_THK, watch = self.run(architecture)
        assert out_THK.dtype == self.shape.dtype
        expected_THK = self.call(module.local_prefill_reference, module.global_prefill_reference)
        tolerance = TOLERANCE[self.shape.dtype]
        torch.testing.assert_close(out_THK.double(), expected_THK, atol=tolerance, rtol=tolerance)
        return watch

    def blocks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Keys that each block of so many queries sees in pages, and among the fresh ones."""
        window = self.shape.window
        for (start, end), offset in zip(self.chunks, self.cu_seqlens_q_S1.tolist(), strict=False):
            for first in range(start, end, tokens):
                stop = min(first + tokens, end)
                if window is None:
                    yield stop, 0
                    continue
                if self.last_key_T is not None:
                    rows = slice(offset + first - start, offset + stop - start)
                    stop = int(self.last_key_T[rows].max()) + 1
                begin = max(0, first - window + 1)
                yield max(0, start - begin), stop - max(begin, start)


def with_gaps(x_TGK: Tensor) -> Tensor:
    """The same values, with NaN between one token's and the next's."""
    wide = torch.full((x_TGK.shape[0], 2, *x_TGK.shape[1:]), torch.nan, dtype=x_TGK.dtype)
    wide[:, 0] = x_TGK
    return wide[:, 0]


def last_keys(chunk: Span, images: Sequence[Span]) -> Tensor:
    """The last position that each query sees; images that a chunk doesn't hold whole are text."""
    last = torch.arange(*chunk)
    for start, end in images:
        if chunk[0] <= start and end <= chunk[1]:
            last[start - chunk[0] : end - chunk[0]] = end - 1
    return last


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Chunks that start and end around pages, windows and blocks."""
    group = draw(st.sampled_from([1, 2, 4, 8, 16]))
    num_kv_heads = draw(st.sampled_from([1, 2, 3] if group < 4 else [1, 2]))
    window = draw(st.sampled_from([None, None, 1, 7, 16, 30, 70]))
    shape = Shape(
        group * num_kv_heads,
        num_kv_heads,
        value_dim=draw(st.sampled_from([12, 16, 24, 32])),
        turned=0 if window else draw(st.sampled_from([0, 4, 16, 20])),
        page_size=draw(st.sampled_from([8, 16, 32, 64])),
        window=window,
        dtype=draw(st.sampled_from(list(TOLERANCE))),
    )
    edges = {0, 1, shape.page_size, window or 16, 2 * (window or 32), 128}
    near = sorted({max(0, n) for edge in edges for n in range(edge - 1, edge + 2)})
    start = st.one_of(st.sampled_from(near), st.integers(0, 150))
    length = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 33]), st.integers(1, 40))
    spans = draw(st.lists(st.tuples(start, length), min_size=1, max_size=7))
    chunks = [(start, start + length) for start, length in spans]
    image = draw(st.tuples(st.integers(0, 20), st.integers(1, 30)))
    has_image = window is not None and draw(st.booleans())
    first = chunks[0][0] + image[0]
    return Case(shape, chunks, [(first, first + image[1])] if has_image else [])


@settings(max_examples=25, deadline=None)
@given(cases())
def test_values(case: Case) -> None:
    case.check()


MODEL_SHAPES = [
    Shape(32, 16, 256, page_size=16, window=40),  # 12B, 26B and 31B, local
    Shape(8, 2, 256, page_size=16, window=40),  # E4B
    Shape(8, 1, 256, page_size=16, window=40),  # E2B
    Shape(8, 2, 512, page_size=64),
    Shape(8, 1, 512, page_size=64),
    Shape(32, 4, 512, 128, page_size=64),  # 31B, global
    Shape(16, 1, 512, 128, page_size=64),  # 12B
    Shape(4, 1, 256, page_size=64),  # Gemma 3 270M and 1B
]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_widths_of_models_with_the_tiles_of_each_architecture(
    architecture: str, shape: Shape
) -> None:
    shape = dataclasses.replace(shape, dtype=torch.bfloat16)
    Case(shape, [(60, 73), (0, 2)]).check(architecture)


@pytest.mark.parametrize("window", [None, 20])
def test_chunks_add_up_to_the_whole_prompt(window: int | None) -> None:
    shape = Shape(4, 2, 16, window=window)
    whole_THK, _ = Case(shape, [(0, 90)]).run()
    chunks = [(0, 1), (1, 33), (33, 40), (40, 90)]
    parts = [Case(shape, [chunk], length=90).run()[0] for chunk in chunks]
    torch.testing.assert_close(torch.cat(parts), whole_THK, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "shape", [Shape(4, 2, 16, window=20), Shape(4, 2, 16), Shape(4, 2, 16, 16)], ids=str
)
def test_output_is_bit_equal_alone_and_in_any_batch(shape: Shape) -> None:
    chunks = [(30, 75), (0, 3), (20, 21), (5, 70)]
    together = Case(shape, chunks)
    parts_THK = together.run()[0].split([end - start for start, end in chunks])
    for i, (chunk, part_THK) in enumerate(zip(chunks, parts_THK, strict=True)):
        alone_THK, _ = Case(shape, [chunk], seeds=[i], length=75).run()
        assert torch.equal(alone_THK, part_THK), chunk


@pytest.mark.parametrize("window", [None, 20])
def test_no_sequences(window: int | None) -> None:
    out_THK, watch = Case(Shape(4, 2, 16, window=window), []).run()
    assert out_THK.shape == (0, 4, 16) and watch.num_launches == 0


def test_sequences_without_tokens_are_skipped() -> None:
    for window in (None, 20):
        Case(Shape(4, 2, 16, window=window), [(9, 9), (3, 12), (0, 0), (5, 6)]).check()


def far_pages(shape: Shape) -> Case:
    """A chunk whose pages begin more than 2³¹ values apart. Memory is taken where it's used."""
    case, stride_page = Case(shape, [(20, 45)]), 3 << 29
    num_pages = len(case.caches[0])
    far = [torch.empty((num_pages - 1) * stride_page + (1 << 16), dtype=shape.dtype)]
    for part, near_PBGC in enumerate(case.caches):
        strides = (stride_page, *near_PBGC.stride()[1:])
        far_PBGC = far[0].as_strided(near_PBGC.shape, strides, part << 15)
        far_PBGC.copy_(near_PBGC)
        case.caches[part] = far_PBGC
    return case


FAR_SHAPES = {
    "local": Shape(4, 2, 16, page_size=16, window=20, dtype=torch.bfloat16),
    "global": Shape(4, 2, 32, 16, page_size=16, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", FAR_SHAPES)
def test_a_cache_of_more_than_4_gib(kind: str) -> None:
    check_far_pages(FAR_SHAPES[kind])


def check_far_pages(shape: Shape) -> None:
    case = far_pages(shape)
    out_THK, _ = case.run()
    expected_THK, _ = Case(shape, case.chunks).run()
    assert torch.equal(out_THK, expected_THK)


@pytest.mark.parametrize("images", [(), ((35, 48),)])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(4, 2, 16, window=20),
        Shape(16, 1, 16, page_size=16, window=33),
        Shape(4, 1, 16),
        Shape(8, 2, 32, 16, page_size=16),
        Shape(32, 16, 256, page_size=16, window=100, dtype=torch.bfloat16),
        Shape(32, 4, 512, 128, page_size=64, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_a_block_of_queries_reads_what_it_sees_once(shape: Shape, images: Sequence[Span]) -> None:
    case = Case(shape, [(0, 3), (31, 70), (5, 25)], images if shape.window else ())
    watch = case.check()
    with triton_on_cpu():
        tile = module.prefill_tile(case.q_THC, shape.turned > 0)
    blocks = list(case.blocks(tile.rows // (shape.num_heads // shape.num_kv_heads)))
    row_bytes = shape.num_kv_heads * shape.width * shape.dtype.itemsize
    paged, fresh = (row_bytes * sum(counts) for counts in zip(*blocks, strict=True))
    assert watch.by_name["k"].loaded == watch.by_name["v"].loaded == fresh
    for name in ("k_cache", "v_cache")[: len(case.caches)]:
        assert watch.by_name[name].loaded == paged
    assert watch.by_name["q"].loaded == case.q_THC.nbytes


SMALL: dict[str, Callable[[], object]] = {
    "local": lambda: Case(
        Shape(4, 2, 16, window=20), [(0, 30), (33, 70), (19, 20), (21, 45), (90, 97)]
    ).check(),
    "image": lambda: Case(
        Shape(4, 2, 16, window=20), [(0, 30), (33, 70)], [(2, 20), (40, 69)]
    ).check(),
    "global": lambda: Case(Shape(4, 2, 24), [(0, 30), (33, 70), (19, 20)]).check(),
    "one page": lambda: Case(Shape(4, 2, 24, page_size=32), [(0, 30), (33, 70)]).check(),
    "packed": lambda: Case(Shape(8, 2, 32, 20), [(0, 30), (33, 70), (19, 20)]).check(),
    "far local": lambda: check_far_pages(FAR_SHAPES["local"]),
    "far global": lambda: check_far_pages(FAR_SHAPES["global"]),
}
BUGS = [
    (
        "window one too long",
        "local",
        "> b_position[:, None] - WINDOW",
        ">= b_position[:, None] - WINDOW",
    ),
    (
        "window one too short",
        "local",
        "b_position[:, None] - WINDOW",
        "b_position[:, None] - WINDOW + 1",
    ),
    ("first key missed", "local", "first_t - WINDOW + 1", "first_t - WINDOW + 2"),
    ("local: own key missed", "local", "<= b_last[:, None]", "< b_last[:, None]"),
    ("local: next key seen", "local", "<= b_last[:, None]", "<= b_last[:, None] + 1"),
    (
        "local: last key missed",
        "local",
        "start + tl.minimum(first_t",
        "start - 1 + tl.minimum(first_t",
    ),
    (
        "image ignored",
        "image",
        "tl.max(b_last, 0) + 1\n",
        "tl.max(b_last, 0) + 1\n        b_last = b_position\n",
    ),
    ("image: last key missed", "image", "tl.max(b_last, 0) + 1", "tl.max(b_last, 0)"),
    ("image: another row's end", "image", "last_key_ptr + first_row", "last_key_ptr"),
    (
        "fresh keys one too late",
        "local",
        "k_ptr += (first_row - start)",
        "k_ptr += (first_row - start + 1)",
    ),
    ("fresh values with the stride of keys", "local", "o_row * stride_vt", "o_row * stride_kt"),
    ("keys of the chunk seen in pages", "local", " & (o_l < start)[None, :]", ""),
    ("no ring", "local", "entry %= RING", "entry += 0"),
    (
        "values beyond the past",
        "local",
        "v_cache_ptr + o_kv, mask=m_kv, other=0.0",
        "v_cache_ptr + o_kv",
    ),
    (
        "masked without a value",
        "local",
        "v_cache_ptr + o_kv, mask=m_kv, other=0.0",
        "v_cache_ptr + o_kv, mask=m_kv",
    ),
    ("sums not rescaled", "local", "b_acc * b_shrink[:, None]", "b_acc"),
    ("weights not rescaled", "global", "b_sum * b_shrink", "b_sum"),
    (
        "infinity minus infinity",
        "local",
        'tl.where(b_new_max == float("-inf"), 0.0, b_new_max)',
        "b_new_max",
    ),
    ("page ids of the block before", "local", "i_l + BLOCK_L, start", "i_l, start"),
    (
        "local: rows beyond the chunk stored",
        "local",
        "b_o, mask=m_m[:, None] & m_k",
        "b_o, mask=m_k",
    ),
    ("rows beyond the chunk stored", "global", "b_o, mask=m_m[:, None] & m_k", "b_o, mask=m_k"),
    ("another group's heads", "local", "i_h = i_g * GROUP + o_m % GROUP", "i_h = o_m % GROUP"),
    ("another head's keys", "local", "k_cache_ptr += i_g * HEAD_DIM", "k_cache_ptr += 0"),
    ("own key missed", "global", "<= (start + o_t)[:, None]", "< (start + o_t)[:, None]"),
    ("next key seen", "global", "<= (start + o_t)[:, None]", "<= (start + o_t)[:, None] + 1"),
    ("last key missed", "global", "stop = start + tl.minimum", "stop = start - 1 + tl.minimum"),
    (
        "values beyond the chunk",
        "global",
        "v_cache_ptr + o_row + o_k[None, :], mask=m_l & m_k, other=0.0",
        "v_cache_ptr + o_row + o_k[None, :]",
    ),
    (
        "pages longer than a block read from their start",
        "one page",
        "o_l % PAGE_SIZE * stride_slot)",
        "o_tile * stride_slot)",
    ),
    ("page of the block before", "one page", "i_l + BLOCK_L, stop", "i_l, stop"),
    ("turned part read from the front", "packed", "o_j = VALUE_DIM + ", "o_j = "),
    ("turned part dropped", "packed", "acc=b_s, input", "acc=b_s * 0, input"),
    ("turned part not masked", "packed", "(o_j < WIDTH)", "(o_j < WIDTH + 8)"),
    (
        "local: offsets of 32 bits",
        "far local",
        "other=0) * stride_page",
        "other=0).to(tl.int32) * stride_page",
    ),
    (
        "offsets of 32 bits",
        "far global",
        "other=0) * stride_page",
        "other=0).to(tl.int32) * stride_page",
    ),
]


@pytest.mark.parametrize("check", SMALL)
def test_what_bugs_are_put_into_is_correct(check: str) -> None:
    SMALL[check]()


@pytest.mark.parametrize(
    ("check", "old", "new"), [bug[1:] for bug in BUGS], ids=[b[0] for b in BUGS]
)
def test_bugs_are_noticed(monkeypatch: pytest.MonkeyPatch, check: str, old: str, new: str) -> None:
    with mutated(prefill_kernels, old, new, count=0) as mutant:
        monkeypatch.setattr(module, "local_kernel", mutant.local_kernel)
        monkeypatch.setattr(module, "global_kernel", mutant.global_kernel)
        with pytest.raises((KernelBug, AssertionError)):
            SMALL[check]()
