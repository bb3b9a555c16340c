"""How many bytes and pages a sequence's keys and values take: arithmetic only, nothing allocated.

One *local page* holds `local_page_size` tokens of all local layers that own KV; one *global page*
`global_page_size` tokens of all global layers that own KV. Both are cut from *sectors* of one byte
arena, whose size is their least common multiple, so either kind can use any sector.

After `n` computed tokens a sequence keeps

    local     positions [max(0, n - window + 1), n)     what the next query may look back at
    global    positions [0, n)

rounded out to whole pages. The allocator, admission and the planner all use this one class.
"""

import math
from dataclasses import dataclass

from bezel.engine.model_config import ModelConfig

GLOBAL_PAGE_FACTOR = 4  # 16 and 64 tokens: the page bytes of Gemma 4 12B, 26B and 31B then nest


@dataclass(frozen=True, slots=True)
class PageCount:
    """A number of pages of each kind."""

    local: int
    global_: int

    def __add__(self, other: "PageCount") -> "PageCount":
        return PageCount(self.local + other.local, self.global_ + other.global_)

    def __sub__(self, other: "PageCount") -> "PageCount":
        return PageCount(self.local - other.local, self.global_ - other.global_)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Page sizes in tokens and bytes, and the window that decides which local pages live."""

    window: int
    local_page_size: int
    global_page_size: int
    local_page_bytes: int
    global_page_bytes: int

    @classmethod
    def for_model(cls, model: ModelConfig, value_bytes: int, local_page_size: int) -> "KVLayout":
        """Layout of `model` with `value_bytes` bytes a number (2 for bfloat16)."""
        window = model.local.window
        assert window is not None
        global_page_size = local_page_size * GLOBAL_PAGE_FACTOR
        local_values = len(model.local_kv_layers) * model.local.kv_values_per_token
        global_values = len(model.global_kv_layers) * model.global_.kv_values_per_token
        return cls(
            window=window,
            local_page_size=local_page_size,
            global_page_size=global_page_size,
            local_page_bytes=local_page_size * local_values * value_bytes,
            global_page_bytes=global_page_size * global_values * value_bytes,
        )

    @property
    def sector_bytes(self) -> int:
        return math.lcm(self.local_page_bytes, self.global_page_bytes)

    @property
    def local_pages_per_sector(self) -> int:
        return self.sector_bytes // self.local_page_bytes

    @property
    def global_pages_per_sector(self) -> int:
        return self.sector_bytes // self.global_page_bytes

    @property
    def max_local_pages(self) -> int:
        """Most local pages a sequence ever holds: a window that starts in the middle of a page."""
        return math.ceil(self.window / self.local_page_size) + 1

    @property
    def ring_size(self) -> int:
        """Entries of the ring-shaped local page table, a power of two, with room for an anchor's
        window."""
        return 1 << (self.max_local_pages + GLOBAL_PAGE_FACTOR - 1).bit_length()

    def local_page_range(self, num_tokens: int, anchor: int | None = None) -> range:
        """Indices (position // page size) of the local pages kept after `num_tokens` tokens; with
        an `anchor`, a position at most a global page earlier, those of its window too."""
        oldest = num_tokens if anchor is None else anchor
        first = max(0, oldest - self.window + 1) // self.local_page_size
        return range(first, math.ceil(num_tokens / self.local_page_size))

    def num_global_pages(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.global_page_size)

    def pages(self, num_tokens: int) -> PageCount:
        """Pages that a sequence of `num_tokens` computed tokens holds."""
        return PageCount(len(self.local_page_range(num_tokens)), self.num_global_pages(num_tokens))

    def peak_pages(self, num_tokens: int) -> PageCount:
        """Pages that suffice at every moment while a sequence grows to `num_tokens` tokens."""
        local = min(self.max_local_pages, math.ceil(num_tokens / self.local_page_size))
        return PageCount(local, self.num_global_pages(num_tokens))

    def num_bytes(self, pages: PageCount) -> int:
        return pages.local * self.local_page_bytes + pages.global_ * self.global_page_bytes

    def num_sectors(self, pages: PageCount) -> int:
        """Sectors that hold `pages` when nothing else shares them."""
        local = math.ceil(pages.local / self.local_pages_per_sector)
        return local + math.ceil(pages.global_ / self.global_pages_per_sector)
