"""Attention of chunks against plain attention; every slot that isn't live holds NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.kernels import prefill_attention
from bezel.kernels.prefill_attention import global_prefill_attention, local_prefill_attention

SCALE, WIDTH = 0.3, 12
ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
Chunk = tuple[int, int]  # positions [start, end)


def boundary_chunks(page_size: int, window: int) -> list[Chunk]:
    """Chunks that start and end around the page and the window, first chunks among them."""
    starts = [0, 1, window - 1, window, window + 1, page_size - 1, page_size, page_size + 1, 50]
    lengths = [1, window - 1, window, window + 1, page_size, 3 * window + 2]
    return [
        (start, start + lengths[i % len(lengths)])
        for i, start in enumerate(starts + starts[::-1])
        if lengths[i % len(lengths)]
    ]


def extents(chunks: list[Chunk]) -> tuple[Tensor, Tensor, int]:
    """`cu_seqlens_q_S1`, `seq_lens_S` and `max_q_len` of chunks."""
    lengths = [end - start for start, end in chunks]
    offsets = [sum(lengths[:i]) for i in range(len(chunks) + 1)]
    seq_lens = torch.tensor([end for _, end in chunks], dtype=torch.int64)
    return torch.tensor(offsets), seq_lens, max(lengths, default=0)


class Sequences:
    """Random queries, keys and values of each chunk, and keys and values of what precedes it."""

    def __init__(
        self,
        chunks: list[Chunk],
        num_heads: int,
        num_kv_heads: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(num_heads)

        def normal(length: int, heads: int) -> Tensor:
            return torch.randn(length, heads, WIDTH, generator=generator).to(dtype)

        self.chunks = chunks
        self.queries = [normal(end - start, num_heads) for start, end in chunks]
        self.keys = [normal(end, num_kv_heads) for _, end in chunks]
        self.values = [normal(end, num_kv_heads) for _, end in chunks]

    @property
    def extents(self) -> tuple[Tensor, Tensor, int]:
        """What both kinds of attention are told: offsets, lengths, the longest chunk."""
        return extents(self.chunks)

    def fresh(self, whole: list[Tensor]) -> Tensor:
        """What belongs to the chunks themselves, one after the other."""
        return torch.cat([x[s:e] for x, (s, e) in zip(whole, self.chunks, strict=True)])

    def expected(self, naive_attention: Callable[..., Tensor], window: int | None) -> Tensor:
        return torch.cat(
            [
                naive_attention(q, k, v, SCALE, window)
                for q, k, v in zip(self.queries, self.keys, self.values, strict=True)
            ]
        )


def run_local(
    make_pages: Callable[..., Any],
    sequences: Sequences,
    page_size: int,
    window: int,
    last_key_T: Tensor | None = None,
) -> Tensor:
    """Pages hold the last `window − 1` positions before each chunk, and nothing of the chunk."""
    num_kv_heads, dtype = sequences.keys[0].shape[1], sequences.keys[0].dtype
    num_pages = len(sequences.chunks) * (window // page_size + 2)
    pages = make_pages(num_pages, page_size, num_kv_heads, WIDTH, dtype=dtype)
    ring_size = 1 << (-(-window // page_size)).bit_length()
    tables = []
    for (start, _), k, v in zip(sequences.chunks, sequences.keys, sequences.values, strict=True):
        first = max(0, start - window + 1)
        tables.append(pages.table(ring_size))
        pages.store(tables[-1], first, k[first:start], v[first:start])
    return local_prefill_attention(
        torch.cat(sequences.queries),
        sequences.fresh(sequences.keys),
        sequences.fresh(sequences.values),
        pages.k_cache_PBGC,
        pages.v_cache_PBGK,
        torch.tensor(tables),
        *sequences.extents,
        SCALE,
        window,
        last_key_T,
    )


def run_global(make_pages: Callable[..., Any], sequences: Sequences, page_size: int) -> Tensor:
    """Pages hold every position, the chunk's own included."""
    num_kv_heads, dtype = sequences.keys[0].shape[1], sequences.keys[0].dtype
    num_entries = max(end for _, end in sequences.chunks) // page_size + 2
    num_pages = len(sequences.chunks) * num_entries
    pages = make_pages(num_pages, page_size, num_kv_heads, WIDTH, dtype=dtype)
    tables = [pages.table(num_entries) for _ in sequences.chunks]
    for table, k, v in zip(tables, sequences.keys, sequences.values, strict=True):
        pages.store(table, 0, k, v)
    return global_prefill_attention(
        torch.cat(sequences.queries),
        pages.k_cache_PBGC,
        pages.v_cache_PBGK,
        torch.tensor(tables),
        *sequences.extents,
        SCALE,
        WIDTH,
    )


def run(
    make_pages: Callable[..., Any], sequences: Sequences, page_size: int, window: int | None
) -> Tensor:
    if window is None:
        return run_global(make_pages, sequences, page_size)
    return run_local(make_pages, sequences, page_size, window)


@pytest.mark.parametrize("window", [1, 5, 7, 16, 24])
@pytest.mark.parametrize("page_size", [8, 16])
def test_local_chunks_at_page_and_window_boundaries(
    make_pages: Callable[..., Any],
    naive_attention: Callable[..., Tensor],
    window: int,
    page_size: int,
) -> None:
    sequences = Sequences(boundary_chunks(page_size, window), 4, 2)
    out = run_local(make_pages, sequences, page_size, window)
    expected = sequences.expected(naive_attention, window)
    torch.testing.assert_close(out.double(), expected, atol=ATOL[torch.float32], rtol=0)


@pytest.mark.parametrize("page_size", [8, 16])
def test_global_chunks_at_page_boundaries(
    make_pages: Callable[..., Any], naive_attention: Callable[..., Tensor], page_size: int
) -> None:
    sequences = Sequences(boundary_chunks(page_size, 2 * page_size), 4, 2)
    out = run_global(make_pages, sequences, page_size)
    expected = sequences.expected(naive_attention, None)
    torch.testing.assert_close(out.double(), expected, atol=ATOL[torch.float32], rtol=0)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("window", [None, 5])
def test_query_heads_share_kv_heads_in_groups(
    make_pages: Callable[..., Any],
    naive_attention: Callable[..., Tensor],
    group: int,
    window: int | None,
) -> None:
    sequences = Sequences([(0, 9), (6, 11)], 2 * group, 2)
    out = run(make_pages, sequences, 8, window)
    expected = sequences.expected(naive_attention, window)
    torch.testing.assert_close(out.double(), expected, atol=ATOL[torch.float32], rtol=0)


@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_chunks_longer_than_a_block_of_queries(
    make_pages: Callable[..., Any],
    naive_attention: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
) -> None:
    monkeypatch.setattr(prefill_attention, "QUERY_BLOCK", 8)
    sequences = Sequences([(0, 7), (3, 11), (20, 29), (0, 40), (35, 59)], 2, 1)
    out = run(make_pages, sequences, 8, window)
    expected = sequences.expected(naive_attention, window)
    torch.testing.assert_close(out.double(), expected, atol=ATOL[torch.float32], rtol=0)


@pytest.mark.parametrize("window", [None, 64])
def test_real_block_of_queries(
    make_pages: Callable[..., Any], naive_attention: Callable[..., Tensor], window: int | None
) -> None:
    end = 100 + prefill_attention.QUERY_BLOCK + 1
    sequences = Sequences([(100, end)], 1, 1)
    out = run(make_pages, sequences, 16, window)
    expected = sequences.expected(naive_attention, window)
    torch.testing.assert_close(out.double(), expected, atol=ATOL[torch.float32], rtol=0)


@pytest.mark.parametrize("window", [None, 7])
def test_bfloat16(
    make_pages: Callable[..., Any], naive_attention: Callable[..., Tensor], window: int | None
) -> None:
    sequences = Sequences([(0, 20), (13, 30)], 4, 2, dtype=torch.bfloat16)
    out = run(make_pages, sequences, 8, window)
    assert out.dtype == torch.bfloat16
    expected = sequences.expected(naive_attention, window)
    torch.testing.assert_close(out.double(), expected, atol=ATOL[torch.bfloat16], rtol=0)


@pytest.mark.parametrize("window", [1, 5, 12, 40])
def test_tokens_of_an_image_see_it_to_its_end(
    make_pages: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Causal, or of one image; in either case no key as old as the window."""
    monkeypatch.setattr(prefill_attention, "QUERY_BLOCK", 8)
    chunks, images = [(0, 30), (17, 41), (33, 36)], [(4, 13), (17, 37), (35, 36)]
    sequences = Sequences(chunks, 4, 2)
    last_keys, expected = [], []
    for i, ((start, end), (first, stop)) in enumerate(zip(chunks, images, strict=True)):
        p, key = torch.arange(start, end)[:, None], torch.arange(end)
        last_keys.append(torch.where((p >= first) & (p < stop), stop - 1, p).flatten())
        is_of_one_image = (p >= first) & (p < stop) & (key >= first) & (key < stop)
        is_seen = ((key <= p) | is_of_one_image) & (key > p - window)
        for h in range(4):
            k_LK, v_LK = sequences.keys[i][:, h // 2].double(), sequences.values[i][:, h // 2]
            scores = sequences.queries[i][:, h].double() @ k_LK.T * SCALE
            weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
            expected.append(weights @ v_LK.double())
    expected_THK = torch.cat(
        [torch.stack(expected[i : i + 4], 1) for i in range(0, len(expected), 4)]
    )
    out = run_local(make_pages, sequences, 8, window, torch.cat(last_keys))
    torch.testing.assert_close(out.double(), expected_THK, atol=ATOL[torch.float32], rtol=0)


def test_no_chunks(make_pages: Callable[..., Any]) -> None:
    pages = make_pages(1, 8, 1, WIDTH)
    q_THK, kv_TGK = torch.empty(0, 2, WIDTH), torch.empty(0, 1, WIDTH)
    k_cache, v_cache = pages.k_cache_PBGC, pages.v_cache_PBGK
    tables = torch.empty(0, 2, dtype=torch.int64)
    local = local_prefill_attention(
        q_THK, kv_TGK, kv_TGK, k_cache, v_cache, tables, *extents([]), SCALE, window=7
    )
    global_ = global_prefill_attention(q_THK, k_cache, v_cache, tables, *extents([]), SCALE, WIDTH)
    assert local.shape == global_.shape == (0, 2, WIDTH)


@pytest.mark.parametrize(("head_dim", "num_pairs", "group"), [(32, 4, 2), (512, 64, 16)])
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
    chunks, half = [(0, 9), (7, 8), (8, 18)], head_dim // 2
    turned = [*range(num_pairs), *range(half, half + num_pairs)]
    pages = make_pages(8, 8, 1, head_dim + len(turned), packed=True)
    w_K = torch.rand(head_dim, generator=generator) + 0.5
    tables, queries, expected = [], [], []
    for start, end in chunks:
        v_LGK = torch.randn(end, 1, head_dim, generator=generator)
        q_THK = torch.randn(end - start, group, head_dim, generator=generator)
        k_LGK = naive_rotary(v_LGK * w_K, list(range(end)), 1e4, num_pairs)
        turned_q = naive_rotary(q_THK, list(range(start, end)), 1e4, num_pairs)
        expected.append(naive_attention(turned_q, k_LGK, v_LGK, 0.1, None))
        folded = q_THK * w_K
        folded[..., turned] = 0.0
        queries.append(torch.cat((folded, turned_q[..., turned].float()), dim=-1))
        tables.append(pages.table(4))
        row = torch.cat((v_LGK, k_LGK[..., turned].float()), dim=-1)
        pages.store(tables[-1], 0, row, None)
    out = global_prefill_attention(
        torch.cat(queries),
        pages.k_cache_PBGC,
        None,
        torch.tensor(tables),
        *extents(chunks),
        0.1,
        head_dim,
    )
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=5e-6, rtol=0)
