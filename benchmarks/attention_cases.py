"""Attention calls of Gemma's shapes, for `kernels.py` to time; see kernel_cases.py.

A decode case is checked on its first and its last sequence, against the reference in float32.

T tokens   H query heads   G kv heads   C values per key   K head width   S sequences   P pages
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from kernel_cases import (
    BATCHES,
    DTYPE,
    PAGE_SIZE,
    Case,
    Stock,
    Work,
    by_shape,
    page_bytes,
    worst_error,
)
from torch import Tensor
from torch.nn import functional as F

from bezel.engine.kv_layout import KVLayout
from bezel.engine.model_config import AttentionConfig, ModelConfig
from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.decode_reference import decode_attention_reference
from bezel.kernels.prefill_attention import (
    global_prefill_attention,
    global_prefill_reference,
    local_prefill_attention,
    local_prefill_reference,
)

CONTEXTS = [1024, 8192, 32_768, 131_072]
VERIFY_LENGTH = 4
CHUNK = 2048
CHUNK_CONTEXTS = [0, 8192, 32_768]
CHECKED_QUERIES = 64  # of a global chunk: so many at its start, in its middle, at its end


@dataclass(frozen=True)
class Paged:
    """An attention shape and its pages; `ring_size` is 0 where pages are kept for ever."""

    attention: AttentionConfig
    page_size: int
    ring_size: int

    @property
    def width(self) -> int:
        """Values of a key as it is stored."""
        turned = 2 * self.attention.rotary.num_frequencies if self.attention.key_is_value else 0
        return self.attention.head_dim + turned

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        """Parts, tokens, heads, values."""
        parts = 1 if self.attention.key_is_value else 2
        return parts, self.page_size, self.attention.num_kv_heads, self.width

    @property
    def scale(self) -> float:
        """For keys that are normal, unlike a model's: weights that neither vanish nor win."""
        return self.width**-0.5

    def num_pages(self, length: int) -> int:
        return self.ring_size or -(-length // self.page_size)

    def num_bytes(self, num_sequences: int, length: int) -> int:
        return page_bytes(num_sequences * self.num_pages(length), *self.page_shape)

    def pages(
        self, stock: Stock, num_sequences: int, length: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """k_cache_PBGC, v_cache_PBGK or None, and a table of pages in random order."""
        num_pages = self.num_pages(length)
        caches = stock.pages(num_sequences * num_pages, *self.page_shape)
        table_SP = stock.shuffled(num_sequences * num_pages).view(num_sequences, num_pages)
        return caches[0], caches[1] if len(caches) > 1 else None, table_SP

    def bytes_of(self, num_keys: int, num_queries: int) -> int:
        """Keys and values read once, queries read, outputs written."""
        parts, _, num_kv_heads, width = self.page_shape
        values = num_keys * num_kv_heads * parts * width
        values += num_queries * self.attention.num_heads * (width + self.attention.head_dim)
        return values * DTYPE.itemsize

    def flops_of(self, num_pairs: int) -> int:
        """Two products for each pair of a query and a key that it sees."""
        return 2 * num_pairs * self.attention.num_heads * (self.width + self.attention.head_dim)


def attention_cases(models: dict[str, ModelConfig]) -> Iterator[Case]:
    for paged, names in by_shape(paged_shapes(models)).items():
        kind = "global" if paged.attention.window is None else "local"
        for context in CONTEXTS:
            for batch in BATCHES:
                build = partial(decode, paged=paged, context=context, batch=batch, q_len=1)
                sizes = {"context": context, "batch": batch}
                num_bytes = paged.num_bytes(batch, context)
                yield Case(f"decode {kind}", names, sizes, build, num_bytes)
        context, batch = CONTEXTS[1], BATCHES[1]
        build = partial(decode, paged=paged, context=context, batch=batch, q_len=VERIFY_LENGTH)
        sizes = {"context": context, "batch": batch, "q_len": VERIFY_LENGTH}
        yield Case(f"verify {kind}", names, sizes, build, paged.num_bytes(batch, context))
        for context in CHUNK_CONTEXTS:
            prefill = prefill_global if paged.attention.window is None else prefill_local
            build = partial(prefill, paged=paged, context=context, num_tokens=CHUNK)
            sizes = {"context": context, "chunk": CHUNK}
            num_bytes = paged.num_bytes(1, context + CHUNK)
            yield Case(f"prefill {kind}", names, sizes, build, num_bytes)


def paged_shapes(models: dict[str, ModelConfig]) -> Iterator[tuple[str, Paged]]:
    for name, model in models.items():
        layout = KVLayout.for_model(model, DTYPE.itemsize, PAGE_SIZE)
        yield name, Paged(model.local, layout.local_page_size, layout.ring_size)
        yield name, Paged(model.global_, layout.global_page_size, 0)


def _alone(
    k_cache: Tensor, v_cache: Tensor | None, table_P: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Float32 copies of the pages of one sequence, and its table of them."""
    v_copy = None if v_cache is None else v_cache[table_P].float()
    return k_cache[table_P].float(), v_copy, torch.arange(len(table_P), device=table_P.device)[None]


def decode(stock: Stock, paged: Paged, context: int, batch: int, q_len: int) -> Work:
    attention, window = paged.attention, paged.attention.window
    k_cache, v_cache, table_SP = paged.pages(stock, batch, context)
    q_THC = stock.normal(batch * q_len, attention.num_heads, paged.width)
    seq_lens_S = torch.full((batch,), context, device=stock.device)
    rest = (paged.scale, window, attention.head_dim, q_len)
    run = partial(decode_attention, q_THC, k_cache, v_cache, table_SP, seq_lens_S, *rest)

    def error() -> float:
        o_THK, worst = run(), 0.0
        for s in {0, batch - 1}:
            rows = slice(s * q_len, (s + 1) * q_len)
            pages = _alone(k_cache, v_cache, table_SP[s])
            expected = decode_attention_reference(
                q_THC[rows].float(), *pages, seq_lens_S[s : s + 1], *rest
            )
            worst = max(worst, worst_error([o_THK[rows]], [expected]))
        return worst

    seen = [min(context - q_len + t + 1, window or context) for t in range(q_len)]
    num_keys = min(context, window + q_len - 1 if window else context)
    moved = paged.bytes_of(batch * num_keys, len(q_THC))
    return Work(run, error, moved, paged.flops_of(batch * sum(seen)))


def prefill_local(stock: Stock, paged: Paged, context: int, num_tokens: int) -> Work:
    attention, window = paged.attention, paged.attention.window
    assert window is not None
    k_cache, v_cache, table_1P = paged.pages(stock, 1, context)
    assert v_cache is not None
    q, k, v = (
        stock.normal(num_tokens, heads, paged.width)
        for heads in (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
    )
    where = (_offsets(num_tokens, stock), _length(context + num_tokens, stock))
    tensors = (q, k, v, k_cache, v_cache, table_1P, *where)
    run = partial(local_prefill_attention, *tensors, num_tokens, paged.scale, window)

    def error() -> float:
        exact = (q.float(), k.float(), v.float(), *_alone(k_cache, v_cache, table_1P[0]))
        expected = local_prefill_reference(*exact, *where, paged.scale, window, None)
        return worst_error([run()], [expected])

    num_past = min(context, window - 1)
    queries = torch.arange(context, context + num_tokens, device=stock.device)[:, None]
    keys = torch.arange(context - num_past, context + num_tokens, device=stock.device)
    mask = (keys <= queries) & (keys > queries - window)
    moved = paged.bytes_of(num_past + num_tokens, num_tokens)
    num_pairs = int(mask.sum())
    return Work(run, error, moved, paged.flops_of(num_pairs), _sdpa(stock, paged, mask))


def prefill_global(stock: Stock, paged: Paged, context: int, num_tokens: int) -> Work:
    attention, length = paged.attention, context + num_tokens
    k_cache, v_cache, table_1P = paged.pages(stock, 1, length)
    q_THC = stock.normal(num_tokens, attention.num_heads, paged.width)
    pages = (k_cache, v_cache, table_1P)
    offsets, lens = _offsets(num_tokens, stock), _length(length, stock)
    rest = (paged.scale, attention.head_dim)
    run = partial(global_prefill_attention, q_THC, *pages, offsets, lens, num_tokens, *rest)

    def error() -> float:
        o_THK, worst = run(), 0.0
        alone = _alone(k_cache, v_cache, table_1P[0])
        span = min(CHECKED_QUERIES, num_tokens)
        for first in (0, (num_tokens - span) // 2, num_tokens - span):
            rows = slice(first, first + span)
            where = (_offsets(span, stock), _length(context + rows.stop, stock))
            expected = global_prefill_reference(q_THC[rows].float(), *alone, *where, *rest)
            worst = max(worst, worst_error([o_THK[rows]], [expected]))
        return worst

    queries = torch.arange(context, length, device=stock.device)[:, None]
    mask = torch.arange(length, device=stock.device) <= queries
    moved = paged.bytes_of(length, num_tokens)
    num_pairs = sum(range(context + 1, length + 1))
    return Work(run, error, moved, paged.flops_of(num_pairs), _sdpa(stock, paged, mask))


def _offsets(num_tokens: int, stock: Stock) -> Tensor:
    return torch.tensor([0, num_tokens], device=stock.device)


def _length(length: int, stock: Stock) -> Tensor:
    return torch.tensor([length], device=stock.device)


def _sdpa(stock: Stock, paged: Paged, mask_TL: Tensor) -> Callable[[], Tensor]:
    """torch's attention, on tensors as it likes them: in one piece, and a key for each head."""
    attention, (num_queries, num_keys) = paged.attention, mask_TL.shape
    q = stock.normal(1, attention.num_heads, num_queries, paged.width)
    k = stock.normal(1, attention.num_heads, num_keys, paged.width)
    v = stock.normal(1, attention.num_heads, num_keys, attention.head_dim)
    return partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask_TL, scale=paged.scale)
