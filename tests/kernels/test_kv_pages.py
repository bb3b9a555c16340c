"""Token rows are written to and read from the right slots of strided page views, and no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.kernels.kv_pages import NO_SLOT, gather_kv, position_slots, token_rows, write_kv

PAGE_SIZE, NUM_PAGES, NUM_LAYERS = 4, 5, 3
NUM_KV_HEADS, HEAD_DIM = 2, 3


def arena() -> Tensor:
    """[page][layer][K, V][token][head][value], every number another one."""
    shape = (NUM_PAGES, NUM_LAYERS, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def new_values(num_tokens: int) -> Tensor:
    shape = (num_tokens, NUM_KV_HEADS, HEAD_DIM)
    return -1.0 - torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("part", [0, 1])
def test_write_touches_the_given_slots_only(layer: int, part: int) -> None:
    pages, values = arena(), new_values(4)
    slots = [13, 0, NO_SLOT, 19]
    expected = pages.clone()
    for value_GK, slot in zip(values, slots, strict=True):
        if slot != NO_SLOT:
            expected[slot // PAGE_SIZE, layer, part, slot % PAGE_SIZE] = value_GK
    write_kv(values, pages[:, layer, part], torch.tensor(slots))
    assert torch.equal(pages, expected)


def test_write_takes_rows_of_a_wider_tensor() -> None:
    """Values are a slice of the fused projection: not contiguous."""
    fused = torch.randn(3, NUM_KV_HEADS + 4, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    pages = arena()
    write_kv(fused[:, 4:], pages[:, 1, 0], torch.tensor([6, 7, 8]))
    for token, slot in enumerate((6, 7, 8)):
        stored = pages[slot // PAGE_SIZE, 1, 0, slot % PAGE_SIZE]
        assert torch.equal(stored, fused[token, 4:])


def test_nothing_to_store() -> None:
    pages = arena()
    write_kv(new_values(2), pages[:, 0, 0], torch.tensor([NO_SLOT, NO_SLOT]))
    write_kv(new_values(0), pages[:, 0, 0], torch.tensor([], dtype=torch.int64))
    assert torch.equal(pages, arena())


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("part", [0, 1])
def test_gather_reads_slots_of_any_shape(layer: int, part: int) -> None:
    pages = arena()
    slots = torch.tensor([[0, 19, 7], [7, 4, 12]])
    found = gather_kv(pages[:, layer, part], slots)
    assert found.shape == (2, 3, NUM_KV_HEADS, HEAD_DIM)
    for i, j in ((i, j) for i in range(2) for j in range(3)):
        slot = int(slots[i, j])
        expected = pages[slot // PAGE_SIZE, layer, part, slot % PAGE_SIZE]
        assert torch.equal(found[i, j], expected)


def test_gather_is_a_copy() -> None:
    pages = arena()
    gather_kv(pages[:, 0, 0], torch.tensor([1, 2])).zero_()
    assert torch.equal(pages, arena())


def test_one_page_and_the_last_token_of_the_arena() -> None:
    pages = arena()[:1]
    write_kv(new_values(1), pages[:, -1, -1], torch.tensor([PAGE_SIZE - 1]))
    assert torch.equal(pages[0, -1, -1, -1], new_values(1)[0])


def test_refuses_tokens_that_are_not_next_to_each_other() -> None:
    with pytest.raises(AssertionError, match="contiguous"):
        token_rows(arena()[:, 0, 0].transpose(1, 2))


def test_position_slots_wraps_around_a_ring() -> None:
    table = torch.tensor([[30, 10, 20, 40], [2, 1, 0, 3]])
    positions = torch.tensor([[0, 7, 15, 16, 35], [3, 4, 31, 32, 33]])
    assert position_slots(positions, table, PAGE_SIZE).tolist() == [
        [30 * 4 + 0, 10 * 4 + 3, 40 * 4 + 3, 30 * 4 + 0, 30 * 4 + 3],
        [2 * 4 + 3, 1 * 4 + 0, 3 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1],
    ]


def test_what_was_written_through_a_ring_comes_back(make_pages: Callable[..., Any]) -> None:
    """Positions 10…29 through a ring of four pages of eight: its entries 1, 2 and 3."""
    pages = make_pages(6, page_size=8, num_kv_heads=2, width=5)
    values = torch.randn(20, 2, 5, generator=torch.Generator().manual_seed(1))
    table = torch.tensor([[4, 0, 5, 2]])
    positions = torch.arange(10, 30)[None]
    slots = position_slots(positions, table, 8)
    write_kv(values, pages.v_cache_PBGK, slots[0])
    assert torch.equal(gather_kv(pages.v_cache_PBGK, slots)[0], values)
    # Page 0 holds positions 10…15 from its third token on, page 5 16…23, page 2 24…29; page 4,
    # whose turn comes at 32, holds nothing.
    assert torch.equal(pages.v_cache_PBGK[0, 2:], values[:6])
    assert torch.equal(pages.v_cache_PBGK[5], values[6:14])
    assert torch.equal(pages.v_cache_PBGK[2, :6], values[14:])
    assert pages.v_cache_PBGK[[4, 1, 3]].isnan().all()
    assert pages.k_cache_PBGC.isnan().all()
