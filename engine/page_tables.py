"""The pages one sequence holds: a growing global table and a ring-shaped local one.

A step computes positions [start, end). Local layers then look back from `start` and leave behind
what the query at `end` needs:

    position      start-W+1        start                 end-W+1          end
    before step   [==== kept ======]
    the step                       [------ computed, `end - start` tokens --]
    after step                                           [==== kept ========]

A chunk reads the old pages before it writes the new ones, layer by layer, so pages that slide out
are reused for what slides in, and a sequence never holds more than `max_local_pages`. A single
token is written before it is read (its attention reads pages only), so there nothing is reused
within the step; pages that slid out go back to the pool when the step is done.
"""

from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.page_pool import PagePool

NO_PAGE = -1


class PageTables:
    """`global_table[i]` holds positions from `i * global_page_size`; page index `i` of the local
    kind stands at `local_table[i % ring_size]`."""

    __slots__ = ("_local_held", "_slid", "global_table", "layout", "local_table")

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.global_table: list[int] = []
        self.local_table = [NO_PAGE] * layout.ring_size
        self._local_held = range(0)
        self._slid: list[int] = []

    @property
    def held(self) -> PageCount:
        return PageCount(len(self._local_held) + len(self._slid), len(self.global_table))

    def num_missing(self, start: int, end: int) -> PageCount:
        """Pages the pool must give before [start, end) can be computed."""
        _, incoming, dropped = self._slide(end)
        recycled = len(dropped) if end - start > 1 else 0
        num_global = self.layout.num_global_pages(end) - len(self.global_table)
        return PageCount(max(0, len(incoming) - recycled), num_global)

    def extend(self, start: int, end: int, pool: PagePool) -> list[int]:
        """Take the pages for [start, end); return the local table to *read* from in this step.

        Call only if the pool can allocate `num_missing`.
        """
        while len(self.global_table) < self.layout.num_global_pages(end):
            self.global_table.append(pool.allocate_global())
        kept, incoming, dropped = self._slide(end)
        slid = [self._entry(index) for index in dropped]
        read_table = self.local_table if end - start == 1 else list(self.local_table)
        recycled = slid if end - start > 1 else []
        for index in incoming:
            page = recycled.pop() if recycled else pool.allocate_local()
            self.local_table[index % self.layout.ring_size] = page
        self._slid = slid
        self._local_held = range(kept.start if kept else incoming.start, incoming.stop)
        return read_table

    def release_slid(self, pool: PagePool) -> None:
        """Give back what slid out of the window; call when the step has been computed."""
        for page in self._slid:
            pool.free_local(page)
        self._slid = []

    def release_all(self, pool: PagePool) -> None:
        """Give back everything, also in the middle of a step that will not run."""
        self.release_slid(pool)
        for index in self._local_held:
            pool.free_local(self._entry(index))
        for page in self.global_table:
            pool.free_global(page)
        self.global_table = []
        self.local_table = [NO_PAGE] * self.layout.ring_size
        self._local_held = range(0)

    def _entry(self, index: int) -> int:
        return self.local_table[index % self.layout.ring_size]

    def _slide(self, end: int) -> tuple[range, range, range]:
        """Page indices that stay, come and go when the sequence reaches `end` tokens."""
        held, target = self._local_held, self.layout.local_page_range(end)
        kept = range(max(held.start, target.start), held.stop)
        incoming = range(max(held.stop, target.start), target.stop)
        dropped = range(held.start, min(held.stop, target.start))
        return kept, incoming, dropped
