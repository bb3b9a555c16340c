"""Reading and writing token rows of a paged cache.

A cache is a strided view `cache_PBGK` of the arena: one page is B tokens of one layer, tokens next
to each other (G·K values each), pages of one id far apart. A *slot* is page · B + offset (int64).

P pages   B tokens per page   G kv heads   K values per head   T, L tokens

Values and cache have one dtype, any. One program of `write_kv` copies BLOCK_W of a token's values:

    values_TGK                       cache_PBGK, page p at p · stride
      t ─► slot_t = p · B + b        [b₀][b₁] … [b: G·K values] …        one row; none for NO_SLOT
"""

import torch
from torch import Tensor

from bezel.kernels.cpu import qkv as cpu
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.jit import runs_triton, tl, triton

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


def write_kv_reference(values_TGK: Tensor, cache_PBGK: Tensor, slot_mapping_T: Tensor) -> None:
    rows, pitch = token_rows(cache_PBGK)
    stored = slot_mapping_T != NO_SLOT
    slots = slot_mapping_T[stored]
    values = values_TGK[stored].flatten(1)
    rows.index_copy_(0, slot_rows(slots, cache_PBGK.shape[1], pitch), values)


@triton.jit
def slot_offset(i_slot, stride_cp, stride_cb, PAGE_SIZE: tl.constexpr):
    """Where a slot's token row begins in the cache: pages are stride_cp apart, tokens stride_cb."""
    return i_slot // PAGE_SIZE * stride_cp + i_slot % PAGE_SIZE * stride_cb


# Slots begin anywhere among a step's inputs: no reason to compile anew.
@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _write_kv_kernel(
    values_ptr,
    cache_ptr,
    slot_ptr,
    stride_vt,
    stride_cp,
    WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    # one value
    i_slot = tl.load(slot_ptr + i_t)
    m_w = (o_w < WIDTH) & (i_slot >= 0)
    # [BLOCK_W]
    b_values = tl.load(values_ptr + i_t * stride_vt + o_w, mask=m_w, other=0.0)
    o_slot = slot_offset(i_slot, stride_cp, WIDTH, PAGE_SIZE)
    tl.store(cache_ptr + o_slot + o_w, b_values, mask=m_w)


def write_kv(values_TGK: Tensor, cache_PBGK: Tensor, slot_mapping_T: Tensor) -> None:
    """Store each token's values at its slot; `NO_SLOT` tokens are not stored.

    A token's values are contiguous, tokens may be any distance apart. No two slots are the same.
    """
    num_tokens, num_heads, head_dim = values_TGK.shape
    page_size, width = cache_PBGK.shape[1], num_heads * head_dim
    if runs_numba(values_TGK, width):
        return cpu.write_kv(values_TGK, cache_PBGK, slot_mapping_T)
    if not runs_triton(values_TGK):
        return write_kv_reference(values_TGK, cache_PBGK, slot_mapping_T)
    assert cache_PBGK.shape[2:] == values_TGK.shape[1:] and cache_PBGK.dtype == values_TGK.dtype
    assert values_TGK.stride()[1:] == (head_dim, 1), "a token's values must be contiguous"
    assert cache_PBGK.stride()[1:] == (width, head_dim, 1), "tokens of a page must be contiguous"
    # A thread has 8 values, one 128-bit access of bfloat16.
    block = min(triton.next_power_of_2(width), 1024)
    _write_kv_kernel[(num_tokens, triton.cdiv(width, block))](
        values_TGK,
        cache_PBGK,
        slot_mapping_T,
        values_TGK.stride(0),
        cache_PBGK.stride(0),
        WIDTH=width,
        PAGE_SIZE=page_size,
        BLOCK_W=block,
        num_warps=max(block // 256, 1),
    )


def gather_kv(cache_PBGK: Tensor, slots: Tensor) -> Tensor:
    """Copy out the rows of `slots` (any shape …): …GK."""
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
