"""Lends the pages of one arena to sequences, in two kinds, with no fixed split between them.

    sector 0        sector 1        sector 2        sector 3
    [l0 l1 l2 l3]   [g5 g6 g7 g8 …] [free]          [l12 l13 l14 l15]

A sector is free, or cut into pages of one kind; it is free again as soon as its last page returns.
Page ids count pages of their kind from the start of the arena, so `id * page_bytes` is the page's
place whatever the sectors around it hold. Nothing is ever moved. Plain ints; no tensors.

A page may have several holders: sequences with the same beginning, and the prefix cache. It returns
when the last of them frees it; while only the cache holds it, it is *idle*.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from bezel.engine.kv_layout import KVLayout, PageCount


class OutOfPages(Exception):
    """No page of the wanted kind is free, and no sector either. The scheduler preempts on it."""


@dataclass(slots=True)
class _Kind:
    pages_per_sector: int
    num_used: int = 0
    num_free: int = 0  # in `partial`; pages of free sectors belong to no kind
    # Sectors with both used and free pages, and their free page ids. A dict keeps insertion order:
    # the sector touched last is filled first, so that others can run empty and be lent anew.
    partial: dict[int, list[int]] = field(default_factory=dict)
    # Holders beyond the first, of pages that have any; and how many of all are the cache.
    others: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    num_idle: int = 0

    def is_idle(self, page: int) -> bool:
        return self.cached.get(page) == 1 + self.others.get(page, 0)


class PagePool:
    """Free lists of the arena. One instance belongs to one engine."""

    def __init__(self, layout: KVLayout, arena_bytes: int) -> None:
        self.layout = layout
        self.num_sectors = arena_bytes // layout.sector_bytes
        self._free_sectors = list(range(self.num_sectors - 1, -1, -1))
        self._local = _Kind(layout.local_pages_per_sector)
        self._global = _Kind(layout.global_pages_per_sector)

    @property
    def used(self) -> PageCount:
        return PageCount(self._local.num_used, self._global.num_used)

    @property
    def idle(self) -> PageCount:
        """Of those used, the pages that nobody but the cache holds."""
        return PageCount(self._local.num_idle, self._global.num_idle)

    @property
    def total(self) -> PageCount:
        """Pages of each kind if the whole arena were lent to that kind alone."""
        return PageCount(
            self.num_sectors * self._local.pages_per_sector,
            self.num_sectors * self._global.pages_per_sector,
        )

    def can_allocate(self, wanted: PageCount) -> bool:
        """Whether `wanted` pages could be allocated now, one after the other."""
        sectors = 0
        for kind, num in ((self._local, wanted.local), (self._global, wanted.global_)):
            missing = num - kind.num_free
            sectors += max(0, -(-missing // kind.pages_per_sector))
        return sectors <= len(self._free_sectors)

    def might_allocate(self, wanted: PageCount) -> bool:
        """Whether that could be if all idle pages were free, wherever they lie; perhaps not."""
        layout, idle = self.layout, self.idle
        free = PageCount(self._local.num_free, self._global.num_free) + idle
        free_bytes = len(self._free_sectors) * layout.sector_bytes + layout.num_bytes(free)
        return layout.num_bytes(wanted) <= free_bytes

    def allocate_local(self) -> int:
        """Take one local page. Raises OutOfPages."""
        return self._allocate(self._local)

    def allocate_global(self) -> int:
        """Take one global page. Raises OutOfPages."""
        return self._allocate(self._global)

    def free_local(self, page: int) -> None:
        """End one holder's hold of it."""
        self._drop(self._local, page)

    def free_global(self, page: int) -> None:
        """End one holder's hold of it."""
        self._drop(self._global, page)

    def share_local(self, page: int) -> None:
        """Add a holder."""
        self._share(self._local, page)

    def share_global(self, page: int) -> None:
        """Add a holder."""
        self._share(self._global, page)

    def is_shared_local(self, page: int) -> bool:
        """Whether it has several holders."""
        return page in self._local.others

    def cache_pages(self, local: Iterable[int] = (), global_: Iterable[int] = ()) -> None:
        """Make the cache a holder; of a local page it may be one several times."""
        for kind, pages in ((self._local, local), (self._global, global_)):
            for page in pages:
                self._share(kind, page)
                # Somebody else holds it as well, so it can't be idle yet.
                kind.cached[page] = kind.cached.get(page, 0) + 1

    def uncache_pages(self, local: Iterable[int] = (), global_: Iterable[int] = ()) -> None:
        """Undo `cache_pages`."""
        for kind, pages in ((self._local, local), (self._global, global_)):
            for page in pages:
                kind.num_idle -= kind.is_idle(page)
                kind.cached[page] -= 1
                if not kind.cached[page]:
                    del kind.cached[page]
                self._release(kind, page)
                kind.num_idle += kind.is_idle(page)

    def _share(self, kind: _Kind, page: int) -> None:
        kind.num_idle -= kind.is_idle(page)
        kind.others[page] = kind.others.get(page, 0) + 1

    def _drop(self, kind: _Kind, page: int) -> None:
        self._release(kind, page)
        kind.num_idle += kind.is_idle(page)

    def _release(self, kind: _Kind, page: int) -> None:
        others = kind.others.pop(page, 0)
        if others > 1:
            kind.others[page] = others - 1
        elif others == 0:
            self._free(kind, page)

    def _allocate(self, kind: _Kind) -> int:
        if not kind.partial:
            if not self._free_sectors:
                raise OutOfPages
            sector = self._free_sectors.pop()
            first = sector * kind.pages_per_sector
            kind.partial[sector] = list(range(first + kind.pages_per_sector - 1, first - 1, -1))
            kind.num_free += kind.pages_per_sector
        sector = next(reversed(kind.partial))
        pages = kind.partial[sector]
        page = pages.pop()
        if not pages:
            del kind.partial[sector]
        kind.num_used += 1
        kind.num_free -= 1
        return page

    def _free(self, kind: _Kind, page: int) -> None:
        sector = page // kind.pages_per_sector
        pages = kind.partial.setdefault(sector, [])
        assert page not in pages, f"page {page} was freed twice"
        pages.append(page)
        kind.num_used -= 1
        kind.num_free += 1
        if len(pages) == kind.pages_per_sector:
            del kind.partial[sector]
            kind.num_free -= kind.pages_per_sector
            self._free_sectors.append(sector)

    def check_integrity(self) -> None:
        """Assert that every sector is accounted for exactly once and the used counts agree."""
        num_full = 0
        for kind in (self._local, self._global):
            for sector, pages in kind.partial.items():
                assert 0 < len(pages) < kind.pages_per_sector
                assert len(set(pages)) == len(pages)
                assert all(page // kind.pages_per_sector == sector for page in pages)
            assert kind.num_free == sum(map(len, kind.partial.values()))
            assert kind.num_idle == sum(map(kind.is_idle, kind.cached))
            free = {page for pages in kind.partial.values() for page in pages}
            assert free.isdisjoint(kind.others) and free.isdisjoint(kind.cached)
            used_in_partial = len(kind.partial) * kind.pages_per_sector - kind.num_free
            full, rest = divmod(kind.num_used - used_in_partial, kind.pages_per_sector)
            assert rest == 0 and full >= 0, "used pages don't fill whole sectors"
            num_full += full
        known = [*self._free_sectors, *self._local.partial, *self._global.partial]
        assert len(set(known)) == len(known), "a sector is in two places"
        assert num_full == self.num_sectors - len(known), "pages were lost or invented"
