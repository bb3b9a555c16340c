"""The kernel that writes token rows, interpreted: bit for bit, every byte it moves, and bugs put
in."""

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, Watch, watched
from torch import Tensor

from bezel.kernels import kv_pages as module
from bezel.kernels.jit import triton_on_cpu
from bezel.kernels.kv_pages import NO_SLOT

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Write:
    """Token t of a tensor with `gap` values between its rows goes to slots[t] of strided pages."""

    slots: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    page_size: int = 4
    dtype: torch.dtype = torch.float32
    gap: int = 0

    def values(self) -> Tensor:
        width = self.num_kv_heads * self.head_dim
        rows = torch.full((len(self.slots), width + self.gap), torch.nan, dtype=self.dtype)
        rows[:, :width] = torch.randn(rows[:, :width].shape)
        return rows[:, :width].unflatten(1, (self.num_kv_heads, self.head_dim))

    def pages(self, num_pages: int = 5) -> Tensor:
        """[page][layer][token][head][value], all NaN."""
        shape = (num_pages, 3, self.page_size, self.num_kv_heads, self.head_dim)
        return torch.full(shape, torch.nan, dtype=self.dtype)


def check(kv_pages: ModuleType, write: Write) -> Watch:
    torch.manual_seed(0)
    values_TGK, pages, expected = write.values(), write.pages(), write.pages()
    for values_GK, slot in zip(values_TGK, write.slots, strict=True):
        if slot != NO_SLOT:
            expected[slot // write.page_size, 1, slot % write.page_size] = values_GK
    slots_T = torch.tensor(write.slots, dtype=torch.int64)
    with watched({"values": values_TGK}) as watch, triton_on_cpu():
        kv_pages.write_kv(values_TGK, pages[:, 1], slots_T)
    torch.testing.assert_close(pages, expected, rtol=0, atol=0, equal_nan=True)
    num_bytes = sum(slot != NO_SLOT for slot in write.slots) * values_TGK[:1].nbytes
    assert watch.by_name["values"].loaded == watch.by_name["cache"].stored == num_bytes
    assert watch.bytes_stored == num_bytes
    return watch


@st.composite
def writes(draw: st.DrawFn) -> Write:
    page_size = draw(st.sampled_from([1, 4, 16]))
    slots = draw(st.lists(st.integers(0, 5 * page_size - 1), unique=True, max_size=7))
    return Write(
        tuple(slot if draw(st.integers(0, 3)) else NO_SLOT for slot in slots),
        num_kv_heads=draw(st.sampled_from([1, 2, 3, 5])),
        head_dim=draw(st.sampled_from([1, 7, 16, 40, 640])),
        page_size=page_size,
        dtype=draw(st.sampled_from(DTYPES)),
        gap=draw(st.sampled_from([0, 1, 16])),
    )


@settings(max_examples=60, deadline=None)
@given(writes())
def test_any_write(write: Write) -> None:
    check(module, write)


# Wider than a block, and not a multiple of one.
STANDARD = Write((6, NO_SLOT, 19, 0, 7, NO_SLOT), 3, 350, page_size=4, dtype=torch.bfloat16, gap=16)


@pytest.mark.parametrize("slots", [(), (NO_SLOT,), (3,), (NO_SLOT, NO_SLOT), (19, 0)])
def test_few_tokens(slots: tuple[int, ...]) -> None:
    check(module, replace(STANDARD, slots=slots))


LOCAL_ROWS = [(1, 256, 16), (2, 256, 16), (8, 256, 16), (16, 256, 16), (16, 128, 16)]
GLOBAL_ROWS = [(1, 512, 64), (2, 512, 64), (1, 640, 64), (2, 640, 64), (4, 640, 64)]


@pytest.mark.parametrize(("num_kv_heads", "head_dim", "page_size"), [*LOCAL_ROWS, *GLOBAL_ROWS])
def test_rows_of_models(num_kv_heads: int, head_dim: int, page_size: int) -> None:
    slots = (page_size - 1, NO_SLOT, page_size, 4 * page_size)
    check(module, Write(slots, num_kv_heads, head_dim, page_size, torch.bfloat16))


def test_offsets_beyond_two_to_the_31() -> None:
    """Pages of the 31B model, of which only those written take up memory."""
    pages = torch.empty(410, 100, 16, 16, 256, dtype=torch.bfloat16)
    assert pages[409].storage_offset() > 2**31
    values_TGK = torch.randn(1, 16, 256).bfloat16()
    with watched(), triton_on_cpu():
        module.write_kv(values_TGK, pages[:, 50], torch.tensor([409 * 16 + 3]))
    assert torch.equal(pages[409, 50, 3], values_TGK[0])


def test_refuses_heads_that_are_not_next_to_each_other() -> None:
    values_TGK, pages = STANDARD.values(), STANDARD.pages()
    slots_T = torch.tensor(STANDARD.slots)
    with triton_on_cpu(), pytest.raises(AssertionError, match="token's values"):
        module.write_kv(values_TGK[..., ::2], pages[:, 1, ..., ::2], slots_T)
    with triton_on_cpu(), pytest.raises(AssertionError, match="tokens of a page"):
        module.write_kv(
            values_TGK, pages[:, 1].transpose(1, 2).contiguous().transpose(1, 2), slots_T
        )


BUGS = {
    "no slot": ("(o_w < WIDTH) & (i_slot >= 0)", "o_w < WIDTH"),
    "slot 0 left out": ("i_slot >= 0", "i_slot > 0"),
    "beyond the row": ("(o_w < WIDTH) & (i_slot", "(o_w < BLOCK_W * 2) & (i_slot"),
    "first block only": ("tl.program_id(1) * BLOCK_W + ", ""),
    "last block missing": ("triton.cdiv(width, block))](", "width // block)]("),
    "pages too close": (
        "cache_PBGK.stride(0),\n        WIDTH",
        "page_size * width,\n        WIDTH",
    ),
    "tokens of a page on one place": (" + i_slot % PAGE_SIZE * stride_cb", ""),
    "pages on one place": ("i_slot // PAGE_SIZE * stride_cp + ", ""),
    "values without a gap": ("i_t * stride_vt", "i_t * WIDTH"),
}


@pytest.mark.parametrize(("old", "new"), BUGS.values(), ids=BUGS)
def test_bugs_are_noticed(old: str, new: str) -> None:
    with mutated(module, old, new) as mutant, pytest.raises((KernelBug, AssertionError)):
        check(mutant, STANDARD)
