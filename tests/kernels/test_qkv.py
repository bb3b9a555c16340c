"""Norms, RoPE and the cache write of a projection, against their formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.kernels.kv_pages import NO_SLOT
from bezel.kernels.qkv import QKVShape, rotate_and_store_global, rotate_and_store_local
from bezel.kernels.rotary import rotary_frequencies, rotary_table

EPS, THETA, PAGE_SIZE = 1e-6, 1e4, 4
POSITIONS = [0, 1, 2, 40, 41]
SLOTS = [6, NO_SLOT, 0, 11, 4]

Turn = Callable[[Tensor, Tensor | None, int], Tensor]


@pytest.fixture
def naive_turn(naive_rotary: Callable[[Tensor, list[int], float, int], Tensor]) -> Turn:
    """RoPE(rms(x) · w) of the first pairs, in float64."""

    def turn(x_THK: Tensor, weight_K: Tensor | None, num_pairs: int) -> Tensor:
        y_THK = normed(x_THK)
        if weight_K is not None:
            y_THK = y_THK * weight_K.double()
        return naive_rotary(y_THK, POSITIONS, THETA, num_pairs)

    return turn


def normed(x_THK: Tensor) -> Tensor:
    x_THK = x_THK.double()
    return x_THK / (x_THK.square().mean(-1, keepdim=True) + EPS).sqrt()


def projection(num_heads: int, head_dim: int) -> Tensor:
    """Heads of all sizes: eps counts in the smallest."""
    generator = torch.Generator().manual_seed(head_dim)
    x_TNK = torch.randn(len(POSITIONS), num_heads, head_dim, generator=generator)
    return x_TNK * torch.logspace(-3, 1, num_heads)[:, None]


def weights(head_dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q_weight_K, k_weight_K = torch.rand(2, head_dim, generator=generator) * 2 - 0.5
    return q_weight_K, k_weight_K


def cos_sin(head_dim: int, num_pairs: int) -> tuple[Tensor, Tensor]:
    frequencies = rotary_frequencies(THETA, head_dim, num_pairs, 1.0)
    return rotary_table(torch.tensor(POSITIONS), frequencies)


def check_stored(cache_PBGC: Tensor, expected_TGC: Tensor, num_stored: int) -> None:
    """These rows in their slots, NaN in all others."""
    expected_PBGC = torch.full_like(cache_PBGC, torch.nan)
    for row_GC, slot in zip(expected_TGC[:num_stored], SLOTS, strict=False):
        if slot != NO_SLOT:
            expected_PBGC[slot // PAGE_SIZE, slot % PAGE_SIZE] = row_GC.float()
    assert_close(cache_PBGC, expected_PBGC)


def assert_close(x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("num_stored", [0, 1, 3, 5])
@pytest.mark.parametrize("has_value_norm", [True, False])
def test_local(
    make_pages: Callable[..., Any], naive_turn: Turn, has_value_norm: bool, num_stored: int
) -> None:
    shape = QKVShape(4, 2, 16, has_value_norm, key_is_value=False)
    x_TNK, (q_weight_K, k_weight_K) = projection(8, 16), weights(16)
    pages = make_pages(3, PAGE_SIZE, 2, 16)
    q_THK, k_TGK, v_TGK = rotate_and_store_local(
        x_TNK,
        shape,
        EPS,
        q_weight_K,
        k_weight_K,
        *cos_sin(16, 8),
        pages.k_cache_PBGC,
        pages.v_cache_PBGK,
        torch.tensor(SLOTS),
        num_stored,
    )
    assert k_TGK is not None and v_TGK is not None
    expected_k = naive_turn(x_TNK[:, 4:6], k_weight_K, 8)
    expected_v = normed(x_TNK[:, 6:]) if has_value_norm else x_TNK[:, 6:]
    assert_close(q_THK, naive_turn(x_TNK[:, :4], q_weight_K, 8))
    assert_close(k_TGK, expected_k[num_stored:])
    assert_close(v_TGK, expected_v[num_stored:])
    check_stored(pages.k_cache_PBGC, expected_k, num_stored)
    check_stored(pages.v_cache_PBGK, expected_v, num_stored)


def test_local_that_shares_keys_and_values(naive_turn: Turn) -> None:
    shape = QKVShape(4, 2, 16, has_value_norm=True, key_is_value=False)
    x_TNK, (q_weight_K, _) = projection(4, 16), weights(16)
    rotary, slots_T = cos_sin(16, 8), torch.tensor(SLOTS)
    q_THK, k_TGK, v_TGK = rotate_and_store_local(
        x_TNK, shape, EPS, q_weight_K, None, *rotary, None, None, slots_T, 2
    )
    assert_close(q_THK, naive_turn(x_TNK, q_weight_K, 8))
    assert k_TGK is None and v_TGK is None


@pytest.mark.parametrize("num_pairs", [4, 16])
@pytest.mark.parametrize("owns_kv", [True, False])
def test_global(
    make_pages: Callable[..., Any], naive_turn: Turn, num_pairs: int, owns_kv: bool
) -> None:
    shape = QKVShape(4, 2, 32, has_value_norm=True, key_is_value=False)
    x_TNK, (q_weight_K, k_weight_K) = projection(8 if owns_kv else 4, 32), weights(32)
    pages = make_pages(3, PAGE_SIZE, 2, 32)
    q_THK = rotate_and_store_global(
        x_TNK,
        shape,
        EPS,
        q_weight_K,
        k_weight_K,
        *cos_sin(32, num_pairs),
        pages.k_cache_PBGC,
        pages.v_cache_PBGK,
        torch.tensor(SLOTS),
        owns_kv,
    )
    assert_close(q_THK, naive_turn(x_TNK[:, :4], q_weight_K, num_pairs))
    num_stored = len(SLOTS) if owns_kv else 0
    k_TGK, v_TGK = naive_turn(x_TNK[:, 4:6], k_weight_K, num_pairs), normed(x_TNK[:, 6:])
    check_stored(pages.k_cache_PBGC, k_TGK, num_stored)
    check_stored(pages.v_cache_PBGK, v_TGK, num_stored)


@pytest.mark.parametrize("owns_kv", [True, False])
def test_packed(make_pages: Callable[..., Any], naive_turn: Turn, owns_kv: bool) -> None:
    """Products of packed queries and rows are those of the queries and keys themselves."""
    num_heads, num_pairs, half, head_dim = 4, 4, 16, 32
    shape = QKVShape(num_heads, 1, head_dim, has_value_norm=True, key_is_value=True)
    x_TNK, (q_weight_K, k_weight_K) = projection(5, head_dim), weights(head_dim)
    pages = make_pages(3, PAGE_SIZE, 1, head_dim + 2 * num_pairs, packed=True)
    q_THC = rotate_and_store_global(
        x_TNK if owns_kv else x_TNK[:, :num_heads],
        shape,
        EPS,
        q_weight_K,
        k_weight_K,
        *cos_sin(head_dim, num_pairs),
        pages.k_cache_PBGC,
        None,
        torch.tensor(SLOTS),
        owns_kv,
    )
    turned = torch.cat((torch.arange(num_pairs), half + torch.arange(num_pairs)))
    q_THK = naive_turn(x_TNK[:, :num_heads], q_weight_K, num_pairs)
    k_TGK = naive_turn(x_TNK[:, num_heads:], k_weight_K, num_pairs)
    folded_THK = q_THK * k_weight_K.double()
    folded_THK[..., turned] = 0
    row_TGC = torch.cat((normed(x_TNK[:, num_heads:]), k_TGK[..., turned]), dim=-1)
    assert_close(q_THC, torch.cat((folded_THK, q_THK[..., turned]), dim=-1))
    assert_close(q_THC @ row_TGC[:, 0].T.float(), q_THK @ k_TGK[:, 0].T)
    check_stored(pages.k_cache_PBGC, row_TGC, len(SLOTS) if owns_kv else 0)


def test_no_tokens(make_pages: Callable[..., Any]) -> None:
    shape = QKVShape(4, 2, 16, has_value_norm=True, key_is_value=False)
    pages, (q_weight_K, k_weight_K) = make_pages(3, PAGE_SIZE, 2, 16), weights(16)
    cos_TJ, sin_TJ = (x[:0] for x in cos_sin(16, 8))
    results = rotate_and_store_local(
        projection(8, 16)[:0],
        shape,
        EPS,
        q_weight_K,
        k_weight_K,
        cos_TJ,
        sin_TJ,
        pages.k_cache_PBGC,
        pages.v_cache_PBGK,
        torch.tensor([], dtype=torch.int64),
        num_stored=0,
    )
    assert [None if x is None else x.shape for x in results] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]
    assert pages.k_cache_PBGC.isnan().all() and pages.v_cache_PBGK.isnan().all()


def test_keys_made_of_values_need_normed_values() -> None:
    with pytest.raises(AssertionError, match="normed"):
        QKVShape(4, 1, 32, has_value_norm=False, key_is_value=True)
