"""The kernel for chunks on CPUs against its references; every slot that isn't live holds NaN."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.kernels.cpu.attention_block import MOST_KEYS, ROWS
from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.cpu.prefill_attention import runs_prefill
from bezel.kernels.prefill_attention import global_prefill_attention, local_prefill_attention

PAGE_SIZE = 8
Chunk = tuple[int, int]  # positions [start, end)
# First chunks and later ones, around a page, a tile of rows and a block of keys.
CHUNKS = [(0, 1), (0, 13), (5, 6), (7, 20), (MOST_KEYS - 3, MOST_KEYS + 30), (300, 331)]


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 1
    value_dim: int = 64
    turned: int = 0
    window: int | None = None
    dtype: torch.dtype = torch.float32


class Case:
    """Random chunks, with what precedes them in pages, on global layers their own keys as well."""

    def __init__(self, make_pages: Callable[..., Any], chunks: list[Chunk], shape: Shape) -> None:
        generator = torch.Generator().manual_seed(len(chunks))
        width = shape.value_dim + shape.turned
        self.shape, self.chunks = shape, chunks
        self.pages = make_pages(
            sum(end // PAGE_SIZE + 2 for _, end in chunks),
            PAGE_SIZE,
            shape.num_kv_heads,
            width,
            packed=shape.turned > 0,
            dtype=shape.dtype,
        )

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(shape.dtype)

        num_entries = max(end for _, end in chunks) // PAGE_SIZE + 2
        if shape.window is not None:
            num_entries = shape.window // PAGE_SIZE + 2
        self.queries = [normal(end - start, shape.num_heads, width) for start, end in chunks]
        self.fresh: list[tuple[Tensor, Tensor]] = []
        self.tables = []
        for start, end in chunks:
            k_LGC = normal(end, shape.num_kv_heads, width)
            v_LGK = None if shape.turned else normal(end, shape.num_kv_heads, width)
            first, stop = 0, end
            if shape.window is not None:
                first, stop = max(0, start - shape.window + 1), start
                assert v_LGK is not None
                self.fresh.append((k_LGC[start:], v_LGK[start:]))
            self.tables.append(self.pages.table(num_entries))
            kept = None if v_LGK is None else v_LGK[first:stop]
            self.pages.store(self.tables[-1], first, k_LGC[first:stop], kept)

    def run(self, rows: list[int] | None = None, last_key_T: Tensor | None = None) -> Tensor:
        rows = list(range(len(self.chunks))) if rows is None else rows
        lengths = [len(self.queries[i]) for i in rows]
        pages = self.pages.k_cache_PBGC, self.pages.v_cache_PBGK
        q_THC = torch.cat([self.queries[i] for i in rows])
        extents = (
            torch.tensor([self.tables[i] for i in rows]),
            torch.tensor([sum(lengths[:i]) for i in range(len(rows) + 1)]),
            torch.tensor([self.chunks[i][1] for i in rows]),
            max(lengths),
            q_THC.shape[-1] ** -0.5,
        )
        if self.shape.window is None:
            return global_prefill_attention(q_THC, *pages, *extents, self.shape.value_dim)
        fresh = [torch.cat([self.fresh[i][part] for i in rows]) for part in (0, 1)]
        return local_prefill_attention(
            q_THC, *fresh, *pages, *extents, self.shape.window, last_key_T
        )

    def check(self, last_key_T: Tensor | None = None) -> None:
        assert runs_prefill(self.queries[0], self.shape.value_dim)
        out = self.run(last_key_T=last_key_T)
        with plain_torch():
            expected = self.run(last_key_T=last_key_T)
        assert out.dtype == self.shape.dtype
        atol = 2e-6 if self.shape.dtype == torch.float32 else 1.6e-2
        torch.testing.assert_close(out, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 13, 150])
def test_chunks_at_page_block_and_window_boundaries(
    make_pages: Callable[..., Any], dtype: torch.dtype, window: int | None
) -> None:
    Case(make_pages, CHUNKS, Shape(dtype=dtype, window=window)).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (14, 2), (48, 1)])
def test_groups_of_any_size_fill_a_block_as_far_as_tokens_are_whole(
    make_pages: Callable[..., Any], dtype: torch.dtype, window: int | None, heads: tuple[int, int]
) -> None:
    Case(make_pages, [(0, ROWS + 2), (3, 21)], Shape(*heads, window=window, dtype=dtype)).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_hold_values_first(make_pages: Callable[..., Any], dtype: torch.dtype) -> None:
    """320 values a key: in float32 more than one sum of words."""
    shape = Shape(8, 2, value_dim=256, turned=64, dtype=dtype)
    Case(make_pages, [(0, 30), (133, 140)], shape).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_tokens_of_an_image_see_it_to_its_end(
    make_pages: Callable[..., Any], dtype: torch.dtype, window: int
) -> None:
    case = Case(make_pages, [(0, 60), (17, 41), (33, 36)], Shape(window=window, dtype=dtype))
    images = [(4, 43), (17, 37), (35, 36)]
    last_keys = []
    for (start, end), (first, stop) in zip(case.chunks, images, strict=True):
        p = torch.arange(start, end)
        last_keys.append(torch.where((p >= first) & (p < stop), stop - 1, p))
    case.check(torch.cat(last_keys))


@pytest.mark.parametrize("window", [None, 30])
def test_output_is_the_same_bits_whatever_the_batch_and_threads(
    make_pages: Callable[..., Any], window: int | None
) -> None:
    case = Case(make_pages, CHUNKS, Shape(window=window, dtype=torch.bfloat16))
    together = case.run().split([end - start for start, end in CHUNKS])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ([4], [5, 0, 1], [3, 2]):
            expected = torch.cat([together[i] for i in rows])
            assert torch.equal(case.run(rows), expected)


def test_scores_far_apart_in_different_blocks(make_pages: Callable[..., Any]) -> None:
    """What was summed up before a much larger score vanishes, nothing overflows."""
    case = Case(make_pages, [(0, 3 * MOST_KEYS)], Shape())
    last = 3 * MOST_KEYS - 1
    page, offset = divmod(last - 5, PAGE_SIZE)
    best = case.tables[0][page]
    case.pages.k_cache_PBGC[best, offset, 0] = 100 * case.queries[0][last, 0]
    out = case.run()
    expected = case.pages.v_cache_PBGK[best, offset, 0]
    torch.testing.assert_close(out[last, 0], expected, atol=1e-6, rtol=0)
    case.check()
