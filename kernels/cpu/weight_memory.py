"""Memory for weights: huge pages where the system has them, matrices side by side.

A step reads every weight once, from memory. In pages of 4 KiB a processor needs a new address every
hundred nanoseconds and seldom reads ahead beyond the page's end. A matrix can be smaller than a
huge page, so matrices share them.
"""

import mmap
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
SLAB_BYTES = 32 * HUGE_PAGE
_ALIGNMENT = 64


class WeightMemory:
    """Gives out memory, of which a slab goes back to the system when nothing refers to it."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor, uint8, that begins with a cache line."""
        num_bytes = prod(shape)
        if num_bytes >= SLAB_BYTES:
            return _slab(num_bytes)[:num_bytes].view(shape)
        if num_bytes > len(self._rest):
            self._rest = _slab(SLAB_BYTES)
        values = self._rest[:num_bytes].view(shape)
        self._rest = self._rest[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return values


def _slab(num_bytes: int) -> Tensor:
    """Whole huge pages, of which each is taken from the system when it is first written."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    # Memory that could be shared, which is what Python takes otherwise, seldom gets huge pages.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=private)
    memory.madvise(mmap.MADV_HUGEPAGE)
    values = torch.frombuffer(memory, dtype=torch.uint8)
    return values[-values.data_ptr() % HUGE_PAGE :][:size]
