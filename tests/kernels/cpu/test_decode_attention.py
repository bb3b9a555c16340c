"""Decode attention's kernel for CPUs against its reference; slots that aren't live hold NaN."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.kernels.cpu.attention_split import SPLIT
from bezel.kernels.cpu.decode_attention import decode_attention_cpu, runs_decode
from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.decode_reference import decode_attention_reference

PAGE_SIZE = 8
# Lengths around a page, a tile of keys, a split and several splits; padding, and none.
LENGTHS = [1, 7, 8, 9, 0, 63, SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT + 5]


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 1
    value_dim: int = 64
    turned: int = 0
    window: int | None = None
    q_len: int = 1
    dtype: torch.dtype = torch.float32


class Case:
    """Random sequences, of each what its queries see in pages."""

    def __init__(self, make_pages: Callable[..., Any], lengths: list[int], shape: Shape) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        width = shape.value_dim + shape.turned
        self.shape, self.lengths = shape, lengths
        self.pages = make_pages(
            sum(n // PAGE_SIZE + 2 for n in lengths),
            PAGE_SIZE,
            shape.num_kv_heads,
            width,
            packed=shape.turned > 0,
            dtype=shape.dtype,
        )

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(shape.dtype)

        self.q_THC = normal(len(lengths) * shape.q_len, shape.num_heads, width)
        num_entries, seen = max(lengths) // PAGE_SIZE + 2, max(lengths)
        if shape.window is not None:
            seen = shape.window + shape.q_len - 1
            num_entries = seen // PAGE_SIZE + 2
        self.tables = []
        for length in lengths:
            count = min(length, seen)
            k_LGC = normal(count, shape.num_kv_heads, width)
            v_LGK = None if shape.turned else normal(count, shape.num_kv_heads, width)
            self.tables.append(self.pages.table(num_entries))
            self.pages.store(self.tables[-1], length - count, k_LGC, v_LGK)

    def run(
        self, attention: Callable[..., Tensor] = decode_attention, rows: list[int] | None = None
    ) -> Tensor:
        rows = list(range(len(self.lengths))) if rows is None else rows
        shape = self.shape
        q_SQHC = self.q_THC.unflatten(0, (-1, shape.q_len))
        return attention(
            q_SQHC[rows].flatten(0, 1),
            self.pages.k_cache_PBGC,
            self.pages.v_cache_PBGK,
            torch.tensor([self.tables[row] for row in rows]),
            torch.tensor([self.lengths[row] for row in rows]),
            self.q_THC.shape[-1] ** -0.5,
            shape.window,
            shape.value_dim,
            shape.q_len,
        )

    def check(self) -> None:
        assert runs_decode(self.q_THC, self.shape.value_dim)
        out, expected = self.run(), self.run(decode_attention_reference)
        assert out.dtype == self.shape.dtype
        atol = 2e-6 if self.shape.dtype == torch.float32 else 1.6e-2
        torch.testing.assert_close(out, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 13, 200])
def test_lengths_at_page_split_and_window_boundaries(
    make_pages: Callable[..., Any], dtype: torch.dtype, window: int | None
) -> None:
    lengths = LENGTHS if window is None else [*LENGTHS, window, window + 1, 3 * window]
    Case(make_pages, lengths, Shape(dtype=dtype, window=window)).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 1), (4, 2), (10, 2), (16, 1)])
def test_query_heads_share_kv_heads_in_groups_of_any_size(
    make_pages: Callable[..., Any], dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    Case(make_pages, [5, 300], Shape(*heads, dtype=dtype)).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4, 140])
def test_several_queries_see_up_to_their_own_position(
    make_pages: Callable[..., Any], dtype: torch.dtype, window: int | None
) -> None:
    shape = Shape(6, 2, window=window, q_len=3, dtype=dtype)
    Case(make_pages, [3, 4, 0, 12, 129, 130, 131, 400], shape).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_hold_values_first(make_pages: Callable[..., Any], dtype: torch.dtype) -> None:
    shape = Shape(8, 2, value_dim=128, turned=32, dtype=dtype)
    Case(make_pages, [1, 40, 0, 290], shape).check()


def test_output_is_the_same_bits_whatever_the_batch_and_threads(
    make_pages: Callable[..., Any],
) -> None:
    case = Case(make_pages, [50, 700, 0, 129, 128, 1], Shape(dtype=torch.bfloat16))
    together = case.run()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ([1], [3, 1, 0], [5, 4, 3, 2, 1, 0], [0]):
            assert torch.equal(case.run(rows=rows), together[rows])


def test_scores_far_apart_in_different_splits(make_pages: Callable[..., Any]) -> None:
    """What came before a much larger score vanishes, nothing overflows."""
    case = Case(make_pages, [3 * SPLIT], Shape())
    best = case.tables[0][2 * SPLIT // PAGE_SIZE]
    case.pages.k_cache_PBGC[best, 0, 0] = 100 * case.q_THC[0, 0]
    out = case.run()
    expected = case.pages.v_cache_PBGK[best, 0, 0]
    torch.testing.assert_close(out[0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(out, case.run(decode_attention_reference), atol=2e-6, rtol=0)


def test_queries_may_stand_apart(make_pages: Callable[..., Any]) -> None:
    """Queries are a part of the rows that one projection gives."""
    case = Case(make_pages, [9, 200], Shape())
    wide = torch.full((2, 6, 64), torch.nan)
    wide[:, :4] = case.q_THC
    expected = case.run()
    args = (torch.tensor(case.tables), torch.tensor(case.lengths), 64**-0.5, None, 64, 1)
    caches = case.pages.k_cache_PBGC, case.pages.v_cache_PBGK
    assert torch.equal(decode_attention_cpu(wide[:, :4], *caches, *args), expected)


def test_no_sequences(make_pages: Callable[..., Any]) -> None:
    case = Case(make_pages, [9], Shape(window=4))
    caches = case.pages.k_cache_PBGC, case.pages.v_cache_PBGK
    tables, lengths = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    out = decode_attention(case.q_THC[:0], *caches, tables, lengths, 1.0, 4, 64)
    assert out.shape == (0, 4, 64)


@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float32), (32, torch.float32)])
def test_other_widths_are_left_to_the_reference(width: int, dtype: torch.dtype) -> None:
    assert not runs_decode(torch.empty(1, 1, width, dtype=dtype), width)
