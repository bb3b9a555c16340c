"""A sequence's window slides through its ring without ever holding more pages than the bound."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables


def layout(window: int) -> KVLayout:
    return KVLayout(window, 16, 64, local_page_bytes=16, global_page_bytes=64)


@pytest.mark.parametrize(
    ("window", "bound", "ring"), [(512, 33, 64), (1024, 65, 128), (5, 2, 8), (17, 3, 8)]
)
def test_bound_and_ring(window: int, bound: int, ring: int) -> None:
    assert layout(window).max_local_pages == bound
    assert layout(window).ring_size == ring


@given(
    window=st.integers(2, 80),
    chunks=st.lists(st.integers(1, 200), min_size=1, max_size=30),
)
def test_any_chunks_stay_within_the_bound_and_keep_the_window(
    window: int, chunks: list[int]
) -> None:
    shape = layout(window)
    pool = PagePool(shape, arena_bytes=64 * 1000)
    tables = PageTables(shape)
    start = 0
    for chunk in chunks:
        end = start + chunk
        before = pool.used
        missing = tables.num_missing(start, end, pool)
        tables.extend(start, end, pool)
        assert pool.used == before + missing == tables.held
        assert tables.held.local <= shape.max_local_pages
        # What the last query sees is one position more than what stays.
        seen = range(max(0, end - window) // 16, -(-end // 16))
        pages = [tables.local_table[i % shape.ring_size] for i in seen]
        assert len(set(pages)) == len(pages) and set(pages) <= set(tables.local_pages())
        tables.release_slid(pool)
        assert pool.used == tables.held == shape.pages(end)
        pages = [tables.local_table[i % shape.ring_size] for i in shape.local_page_range(end)]
        assert len(set(pages)) == len(pages) and min(pages) >= 0
        pool.check_integrity()
        start = end
    tables.release_all(pool)
    assert pool.used == PageCount(0, 0)


def test_release_in_the_middle_of_a_step_returns_everything() -> None:
    shape = layout(32)
    pool = PagePool(shape, arena_bytes=64 * 100)
    tables = PageTables(shape)
    tables.extend(0, 40, pool)
    tables.release_slid(pool)
    tables.extend(40, 200, pool)
    tables.release_all(pool)
    assert pool.used == PageCount(0, 0)
    assert tables.held == PageCount(0, 0)
    pool.check_integrity()


def test_a_chunk_reads_the_table_from_before_it() -> None:
    shape = layout(32)
    pool = PagePool(shape, arena_bytes=64 * 100)
    tables = PageTables(shape)
    tables.extend(0, 64, pool)
    tables.release_slid(pool)
    old = [tables.local_table[i % shape.ring_size] for i in (2, 3)]
    read_table = tables.extend(64, 128, pool)
    assert [read_table[i % shape.ring_size] for i in (2, 3)] == old
    new = [tables.local_table[i % shape.ring_size] for i in (6, 7)]
    assert sorted(new) == sorted(old), "the pages that slide out are the ones that slide in"


@given(window=st.integers(2, 80), start=st.integers(2, 150), lead=st.integers(0, 63))
def test_the_pages_are_right_after_every_token_most_of_which_are_steady(
    window: int, start: int, lead: int
) -> None:
    shape = layout(window)
    pool = PagePool(shape, arena_bytes=64 * 1000)
    tables = PageTables(shape)
    tables.extend(0, start, pool, anchor=max(1, start - lead))
    tables.release_slid(pool)
    num_steady = 0
    for end in range(start + 1, start + 200):
        if tables.is_steady(end):
            num_steady += 1
        else:
            tables.extend(end - 1, end, pool)
            tables.release_slid(pool)
        assert tables.held == shape.pages(end)
    assert num_steady > 150
