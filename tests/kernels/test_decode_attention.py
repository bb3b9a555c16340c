"""Decode attention against plain attention; every slot that isn't live holds NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.kernels.decode_attention import decode_attention

SCALE = 0.3
ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def boundary_lengths(page_size: int, window: int | None) -> list[int]:
    """Lengths one less than, equal to and one more than a page, two pages, the window."""
    edges = [page_size, 2 * page_size, *([] if window is None else [window, 3 * window])]
    return sorted({n + d for n in edges for d in (-1, 0, 1) if n + d > 0} | {1, 2, 50})


def ring_size(page_size: int, window: int) -> int:
    return 1 << (-(-window // page_size)).bit_length()


class Case:
    """Random sequences, their live keys and values in pages, one query each."""

    def __init__(
        self,
        make_pages: Callable[..., Any],
        lengths: list[int],
        num_heads: int,
        num_kv_heads: int,
        page_size: int,
        window: int | None,
        width: int = 12,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(num_heads + page_size)
        num_pages = sum(length // page_size + 2 for length in lengths)
        self.pages = make_pages(num_pages, page_size, num_kv_heads, width, dtype=dtype)
        self.lengths, self.window = lengths, window
        self.num_entries = (
            max(lengths) // page_size + 2 if window is None else ring_size(page_size, window)
        )
        self.q_SHC = torch.randn(len(lengths), num_heads, width, generator=generator).to(dtype)
        self.keys = [
            torch.randn(n, num_kv_heads, width, generator=generator).to(dtype) for n in lengths
        ]
        self.values = [
            torch.randn(n, num_kv_heads, width, generator=generator).to(dtype) for n in lengths
        ]
        self.tables = [self._store(k, v) for k, v in zip(self.keys, self.values, strict=True)]

    def _store(self, k_LGC: Tensor, v_LGK: Tensor) -> list[int]:
        first = 0 if self.window is None else max(0, len(k_LGC) - self.window)
        table: list[int] = self.pages.table(self.num_entries)
        self.pages.store(table, first, k_LGC[first:], v_LGK[first:])
        return table

    def run(self, rows: list[int] | None = None) -> Tensor:
        rows = list(range(len(self.lengths))) if rows is None else rows
        return decode_attention(
            self.q_SHC[rows],
            self.pages.k_cache_PBGC,
            self.pages.v_cache_PBGK,
            torch.tensor([self.tables[row] for row in rows]),
            torch.tensor([self.lengths[row] for row in rows]),
            SCALE,
            self.window,
            self.q_SHC.shape[-1],
        )

    def expected(self, naive_attention: Callable[..., Tensor]) -> Tensor:
        return torch.cat(
            [
                naive_attention(q[None], k, v, SCALE, self.window)
                for q, k, v in zip(self.q_SHC, self.keys, self.values, strict=True)
            ]
        )


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("window", [None, 1, 5, 7, 16, 24])
@pytest.mark.parametrize("page_size", [8, 16])
def test_lengths_at_page_and_window_boundaries(
    make_pages: Callable[..., Any],
    naive_attention: Callable[..., Tensor],
    group: int,
    window: int | None,
    page_size: int,
) -> None:
    lengths = boundary_lengths(page_size, window)
    case = Case(make_pages, lengths, 2 * group, 2, page_size, window)
    torch.testing.assert_close(
        case.run().double(), case.expected(naive_attention), atol=ATOL[torch.float32], rtol=0
    )


@pytest.mark.parametrize("window", [None, 7])
def test_bfloat16(
    make_pages: Callable[..., Any], naive_attention: Callable[..., Tensor], window: int | None
) -> None:
    case = Case(make_pages, [1, 9, 40], 4, 2, 8, window, dtype=torch.bfloat16)
    out = case.run()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.double(), case.expected(naive_attention), atol=ATOL[torch.bfloat16], rtol=0
    )


def test_output_does_not_depend_on_batch_mates_or_their_order(
    make_pages: Callable[..., Any],
) -> None:
    case = Case(make_pages, [1, 3, 17, 30, 31, 50, 200], 4, 2, 8, None)
    together = case.run()
    order = [6, 2, 4, 0, 5, 3, 1]
    torch.testing.assert_close(case.run(order), together[order], atol=1e-6, rtol=0)
    for row in range(len(case.lengths)):
        torch.testing.assert_close(case.run([row])[0], together[row], atol=1e-6, rtol=0)


def test_no_sequences(make_pages: Callable[..., Any]) -> None:
    pages = make_pages(2, 8, 1, 12)
    out = decode_attention(
        torch.empty(0, 4, 12),
        pages.k_cache_PBGC,
        pages.v_cache_PBGK,
        torch.empty(0, 2, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        SCALE,
        None,
        12,
    )
    assert out.shape == (0, 4, 12)


@pytest.mark.parametrize(
    ("head_dim", "num_pairs", "group"), [(32, 4, 2), (32, 16, 1), (512, 64, 16)]
)
def test_packed_rows_equal_plain_attention_with_keys_turned_from_values(
    make_pages: Callable[..., Any],
    naive_attention: Callable[..., Tensor],
    naive_rotary: Callable[..., Tensor],
    head_dim: int,
    num_pairs: int,
    group: int,
) -> None:
    """K = RoPE(w ⊙ V). A row holds V and the turned pairs of K, 512 + 128 values at Gemma's size;
    the query is folded likewise."""
    generator = torch.Generator().manual_seed(head_dim)
    lengths, half, num_kv_heads = [1, 8, 9, 40], head_dim // 2, 2
    turned = [*range(num_pairs), *range(half, half + num_pairs)]
    pages = make_pages(20, 8, num_kv_heads, head_dim + len(turned), packed=True)
    w_K = torch.rand(head_dim, generator=generator) + 0.5
    tables, queries, expected = [], [], []
    for length in lengths:
        v_LGK = torch.randn(length, num_kv_heads, head_dim, generator=generator)
        q_1HK = torch.randn(1, num_kv_heads * group, head_dim, generator=generator)
        k_LGK = naive_rotary(v_LGK * w_K, list(range(length)), 1e4, num_pairs)
        turned_q = naive_rotary(q_1HK, [length - 1], 1e4, num_pairs)
        expected.append(naive_attention(turned_q, k_LGK, v_LGK, 0.1, None))
        folded = q_1HK * w_K
        folded[..., turned] = 0.0
        queries.append(torch.cat((folded, turned_q[..., turned].float()), dim=-1))
        tables.append(pages.table(8))
        row = torch.cat((v_LGK, k_LGK[..., turned].float()), dim=-1)
        pages.store(tables[-1], 0, row, None)
    out = decode_attention(
        torch.cat(queries),
        pages.k_cache_PBGC,
        None,
        torch.tensor(tables),
        torch.tensor(lengths),
        0.1,
        None,
        head_dim,
    )
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=5e-6, rtol=0)
