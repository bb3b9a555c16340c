"""The pages one sequence holds: a growing global table and a ring-shaped local one.

A step computes positions [start, end). Local layers then look back from `start` and leave behind
what the query at `end` needs:

    position      start-W+1        start                 end-W+1          end
    before step   [==== kept ======]
    the step                       [------ computed, `end - start` tokens --]
    after step                                           [==== kept ========]

A chunk reads the old pages before it writes the new ones, layer by layer, so pages that slide out
are reused for what slides in, and a sequence holds no more than `max_local_pages`. A single
token is written before it is read (its attention reads pages only), so there nothing is reused
within the step; pages that slid out go back to the pool when the step is done.

The last query of a chunk sees one position more than is kept after it, and layers without keys and
values of their own see it as a decode, which reads pages only. So that position has a page, too,
until the step is done.

A step may also keep the window of an earlier position, its *anchor*, for the prefix cache: a global
page's worth of tokens more, until the step is done. Pages that others hold too are never reused, so
that until the step is done there are new ones beside them.
"""

from array import array
from collections.abc import Sequence

from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.page_pool import PagePool

NO_PAGE = -1


class PageTables:
    """`global_table[i]` holds positions from `i * global_page_size`; page index `i` of the local
    kind stands at `local_table[i % ring_size]`; both hold int64, which numpy reads in place. The
    first `num_shared_global` pages came from the cache with their content, and are not written
    again."""

    __slots__ = (
        "_local_held",
        "_slid",
        "_steady_until",
        "global_table",
        "layout",
        "local_table",
        "num_shared_global",
    )

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.global_table = array("q")
        self.num_shared_global = 0
        self.local_table = array("q", [NO_PAGE]) * layout.ring_size
        self._local_held = range(0)
        self._slid: list[int] = []
        self._steady_until = 0

    @property
    def held(self) -> PageCount:
        return PageCount(len(self._local_held) + len(self._slid), len(self.global_table))

    def adopt(
        self, position: int, local: Sequence[int], global_: Sequence[int], pool: PagePool
    ) -> None:
        """Begin at `position` with pages of the cache: `local` are those of its window."""
        assert not self.global_table and not self._local_held
        for page in global_:
            pool.share_global(page)
        for page in local:
            pool.share_local(page)
        self.global_table = array("q", global_)
        self.num_shared_global = len(global_)
        self._local_held = self.layout.local_page_range(position)
        for index, page in zip(self._local_held, local, strict=True):
            self.local_table[index % self.layout.ring_size] = page

    def window_pages(self, position: int) -> list[int]:
        """The local pages of the window at `position`, which must be held still."""
        indices = self.layout.local_page_range(position)
        assert indices.start >= self._local_held.start and indices.stop <= self._local_held.stop
        return [self._entry(index) for index in indices]

    def local_pages(self) -> list[int]:
        """All local pages held, those that slid out in the step under way too."""
        return [*(self._entry(index) for index in self._local_held), *self._slid]

    def is_steady(self, end: int) -> bool:
        """Whether one more token, the one before `end`, changes nothing about the pages held."""
        return end <= self._steady_until

    def num_missing(
        self, start: int, end: int, pool: PagePool, anchor: int | None = None
    ) -> PageCount:
        """Pages the pool must give before [start, end) can be computed."""
        _, incoming, dropped = self._slide(end, oldest_kept(start, end, anchor))
        recycled = len(self._recycled(dropped, pool)) if end - start > 1 else 0
        num_global = self.layout.num_global_pages(end) - len(self.global_table)
        return PageCount(max(0, len(incoming) - recycled), max(0, num_global))

    def extend(
        self, start: int, end: int, pool: PagePool, anchor: int | None = None
    ) -> "array[int]":
        """Take the pages for [start, end); return the local table to *read* from in this step.

        Call only if the pool can allocate `num_missing`.
        """
        while len(self.global_table) < self.layout.num_global_pages(end):
            self.global_table.append(pool.allocate_global())
        kept, incoming, dropped = self._slide(end, oldest_kept(start, end, anchor))
        slid = [self._entry(index) for index in dropped]
        read_table = self.local_table if end - start == 1 else self.local_table[:]
        recycled = self._recycled(dropped, pool) if end - start > 1 else []
        for index in incoming:
            if recycled:
                page = recycled.pop()
                slid.remove(page)
            else:
                page = pool.allocate_local()
            self.local_table[index % self.layout.ring_size] = page
        first = kept.start if kept else incoming.start
        first_held = max(first, self.layout.local_page_range(end, anchor).start)
        self._slid = slid + [self._entry(index) for index in range(first, first_held)]
        self._local_held = range(first_held, incoming.stop)
        self._steady_until = self._next_change()
        return read_table

    def release_slid(self, pool: PagePool) -> None:
        """Give back what slid out of the window; call when the step has been computed."""
        if self._slid:
            for page in self._slid:
                pool.free_local(page)
            self._slid = []

    def release_anchor(self, end: int, pool: PagePool) -> None:
        """Give back what only the window of an anchor needed; call when the step up to `end` has
        been computed, and the cache has taken what it wants."""
        needed = self.layout.local_page_range(end)
        for index in range(self._local_held.start, needed.start):
            pool.free_local(self._entry(index))
        self._local_held = needed
        self._steady_until = self._next_change()

    def release_all(self, pool: PagePool) -> None:
        """Give back everything, also in the middle of a step that will not run."""
        self.release_slid(pool)
        for index in self._local_held:
            pool.free_local(self._entry(index))
        for page in self.global_table:
            pool.free_global(page)
        self.global_table = array("q")
        self.num_shared_global = 0
        self.local_table = array("q", [NO_PAGE]) * self.layout.ring_size
        self._local_held = range(0)
        self._steady_until = 0

    def _next_change(self) -> int:
        """Up to how many tokens the pages held are those of the sequence."""
        layout, held = self.layout, self._local_held
        last_in_window = (held.start + 1) * layout.local_page_size + layout.window - 2
        filled = min(
            held.stop * layout.local_page_size, len(self.global_table) * layout.global_page_size
        )
        return min(last_in_window, filled)

    def _entry(self, index: int) -> int:
        return self.local_table[index % self.layout.ring_size]

    def _recycled(self, dropped: range, pool: PagePool) -> list[int]:
        pages = (self._entry(index) for index in dropped)
        return [page for page in pages if not pool.is_shared_local(page)]

    def _slide(self, end: int, oldest: int) -> tuple[range, range, range]:
        """Page indices that stay, come and go when the sequence reaches `end` tokens and keeps the
        windows from position `oldest` on."""
        held, target = self._local_held, self.layout.local_page_range(end, oldest)
        kept = range(max(held.start, target.start), held.stop)
        incoming = range(max(held.stop, target.start), target.stop)
        dropped = range(held.start, min(held.stop, target.start))
        return kept, incoming, dropped


def oldest_kept(start: int, end: int, anchor: int | None) -> int:
    """The first position whose window is in pages when [start, end) has been computed."""
    oldest = end if anchor is None else anchor
    return oldest if end - start == 1 else min(oldest, end - 1)
