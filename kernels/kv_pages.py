"""Reading and writing token rows of a paged cache.

A cache is a strided view `cache_PBGK` of the arena: one page is B tokens of one layer, tokens next
to each other (G·K values each), pages of one id far apart. A *slot* is page · B + offset.

P pages   B tokens per page   G kv heads   K values per head   T, L tokens
"""

import torch
from torch import Tensor

NO_SLOT = -1


def token_rows(cache_PBGK: Tensor) -> tuple[Tensor, int]:
    """The cache as a matrix of token rows, and the number of rows from one page to the next."""
    num_pages, page_size, num_heads, head_dim = cache_PBGK.shape
    width = num_heads * head_dim
    pitch, rest = divmod(cache_PBGK.stride(0), width)
    assert cache_PBGK.stride()[1:] == (width, head_dim, 1), "tokens of a page must be contiguous"
    assert rest == 0, "pages must be a whole number of token rows apart"
    num_rows = (num_pages - 1) * pitch + page_size
    return cache_PBGK.as_strided((num_rows, width), (width, 1)), pitch


def slot_rows(slots: Tensor, page_size: int, pitch: int) -> Tensor:
    """Row numbers of slots, of any shape."""
    return slots // page_size * pitch + slots % page_size


def write_kv(values_TGK: Tensor, cache_PBGK: Tensor, slot_mapping_T: Tensor) -> None:
    """Store each token's values at its slot (int64); `NO_SLOT` tokens are not stored."""
    rows, pitch = token_rows(cache_PBGK)
    stored = slot_mapping_T != NO_SLOT
    slots = slot_mapping_T[stored]
    values = values_TGK[stored].flatten(1)
    rows.index_copy_(0, slot_rows(slots, cache_PBGK.shape[1], pitch), values)


def gather_kv(cache_PBGK: Tensor, slots: Tensor) -> Tensor:
    """Copy out the rows of `slots` (int64, any shape …): …GK."""
    page_size, num_heads, head_dim = cache_PBGK.shape[1:]
    rows, pitch = token_rows(cache_PBGK)
    found = rows.index_select(0, slot_rows(slots.flatten(), page_size, pitch))
    return found.view(*slots.shape, num_heads, head_dim)


def position_slots(positions: Tensor, page_table: Tensor, page_size: int) -> Tensor:
    """Slots of positions (int64, S×L) through tables S×P, whose index wraps around at P.

    A table as long as the sequence never wraps; a ring does.
    """
    entries = torch.div(positions, page_size, rounding_mode="floor") % page_table.shape[1]
    return page_table.gather(1, entries) * page_size + positions % page_size
