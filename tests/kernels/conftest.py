"""Paged caches as the engine's arena lays them out, with NaN wherever nothing was stored."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

NUM_LAYERS, LAYER = 3, 1  # the caches are a middle layer's, so that pages are strided


@dataclass(frozen=True)
class Pages:
    """One layer's caches, every slot NaN at first, and the ids of its pages in random order."""

    k_cache_PBGC: Tensor
    v_cache_PBGK: Tensor | None
    free: list[int]

    @property
    def page_size(self) -> int:
        return self.k_cache_PBGC.shape[1]

    def table(self, num_entries: int) -> list[int]:
        """A table that leads nowhere: every entry is a page that holds NaN only."""
        return [self.k_cache_PBGC.shape[0] - 1] * num_entries

    def store(self, table: list[int], first: int, k_LGC: Tensor, v_LGK: Tensor | None) -> None:
        """Store positions from `first` on, one at a time, taking a page where one begins."""
        for position, k_GC in enumerate(k_LGC, start=first):
            entry, offset = position // self.page_size % len(table), position % self.page_size
            if offset == 0 or position == first:
                table[entry] = self.free.pop()
            self.k_cache_PBGC[table[entry], offset] = k_GC
            if v_LGK is not None:
                assert self.v_cache_PBGK is not None
                self.v_cache_PBGK[table[entry], offset] = v_LGK[position - first]


@pytest.fixture
def make_pages() -> Callable[..., Pages]:
    """Pages of `num_kv_heads · width` values a token; `packed` ones have no cache for values."""

    def make(
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        width: int,
        packed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Pages:
        parts = 1 if packed else 2
        shape = (num_pages + 1, NUM_LAYERS, parts, page_size, num_kv_heads, width)
        arena = torch.full(shape, torch.nan, dtype=dtype)
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(3)).tolist()
        return Pages(arena[:, LAYER, 0], None if packed else arena[:, LAYER, 1], free)

    return make


@pytest.fixture
def naive_attention() -> Callable[..., Tensor]:
    """Attention of one sequence's last queries, head by head and query by query in float64."""

    def attention(
        q_QHC: Tensor, k_LGC: Tensor, v_LGK: Tensor, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = q_QHC.double(), k_LGC.double(), v_LGK.double()
        num_queries, num_heads, _ = q.shape
        num_keys, num_kv_heads, _ = k.shape
        out = torch.empty(num_queries, num_heads, v.shape[-1], dtype=torch.float64)
        for i in range(num_queries):
            position = num_keys - num_queries + i
            first = 0 if window is None else max(0, position - window + 1)
            for h in range(num_heads):
                g = h * num_kv_heads // num_heads
                scores = k[first : position + 1, g] @ q[i, h] * scale
                weights = (scores - scores.max()).exp()
                out[i, h] = weights / weights.sum() @ v[first : position + 1, g]
        return out

    return attention


@pytest.fixture
def naive_rotary() -> Callable[[Tensor, list[int], float, int], Tensor]:
    """x_THK with its first pairs (j, j + K/2) turned by position · theta^(−2j/K), in float64."""

    def rotary(x_THK: Tensor, positions: list[int], theta: float, num_pairs: int) -> Tensor:
        y, half = x_THK.double().clone(), x_THK.shape[-1] // 2
        for j in range(num_pairs):
            angles = torch.tensor(positions).double() * theta ** (-j / half)
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            first, second = x_THK[..., j].double(), x_THK[..., j + half].double()
            y[..., j] = first * cos - second * sin
            y[..., j + half] = second * cos + first * sin
        return y

    return rotary
