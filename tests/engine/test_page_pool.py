"""The arena lends pages of two kinds from shared sectors and gets every one of them back."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.page_pool import OutOfPages, PagePool

LAYOUT = KVLayout(
    window=32, local_page_size=16, global_page_size=64, local_page_bytes=300, global_page_bytes=200
)  # sector 600: 2 local pages or 3 global ones


def test_a_sector_serves_either_kind_but_not_both_at_once() -> None:
    pool = PagePool(LAYOUT, arena_bytes=600)
    assert pool.total == PageCount(2, 3)
    page = pool.allocate_local()
    with pytest.raises(OutOfPages):
        pool.allocate_global()
    pool.free_local(page)
    assert sorted(pool.allocate_global() for _ in range(3)) == [0, 1, 2]
    with pytest.raises(OutOfPages):
        pool.allocate_local()


def test_pages_of_both_kinds_never_overlap_in_bytes() -> None:
    pool = PagePool(LAYOUT, arena_bytes=6 * 600)
    spans = []
    for _ in range(5):
        local, global_ = pool.allocate_local(), pool.allocate_global()
        spans.append((local * 300, local * 300 + 300))
        spans.append((global_ * 200, global_ * 200 + 200))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= 6 * 600


def test_freeing_twice_is_our_mistake() -> None:
    pool = PagePool(LAYOUT, arena_bytes=1200)
    pool.allocate_local()
    page = pool.allocate_local()
    pool.free_local(page)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free_local(page)


@given(
    num_sectors=st.integers(1, 6),
    operations=st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 50)), max_size=80),
)
def test_random_operations_conserve_pages(
    num_sectors: int, operations: list[tuple[bool, bool, int]]
) -> None:
    pool = PagePool(LAYOUT, arena_bytes=num_sectors * 600 + 17)
    held: dict[bool, list[int]] = {True: [], False: []}
    for is_local, is_free, pick in operations:
        mine = held[is_local]
        if is_free and mine:
            page = mine.pop(pick % len(mine))
            (pool.free_local if is_local else pool.free_global)(page)
        elif not is_free:
            wanted = PageCount(1, 0) if is_local else PageCount(0, 1)
            possible = pool.can_allocate(wanted)
            try:
                mine.append(pool.allocate_local() if is_local else pool.allocate_global())
                assert possible
            except OutOfPages:
                assert not possible
        pool.check_integrity()
        assert pool.used == PageCount(len(held[True]), len(held[False]))
        assert len(set(held[True])) == len(held[True]) and len(set(held[False])) == len(held[False])
    for page in held[True]:
        pool.free_local(page)
    for page in held[False]:
        pool.free_global(page)
    pool.check_integrity()
    assert pool.used == PageCount(0, 0)
    assert pool.can_allocate(pool.layout.pages(0) + PageCount(2 * num_sectors, 0))


@given(
    taken=st.lists(st.booleans(), max_size=12),
    local=st.integers(0, 14),
    global_=st.integers(0, 20),
)
def test_can_allocate_is_exact(taken: list[bool], local: int, global_: int) -> None:
    pool = PagePool(LAYOUT, arena_bytes=6 * 600)
    for is_local in taken:
        try:
            _ = pool.allocate_local() if is_local else pool.allocate_global()
        except OutOfPages:
            break
    possible = pool.can_allocate(PageCount(local, global_))
    try:
        for _ in range(local):
            pool.allocate_local()
        for _ in range(global_):
            pool.allocate_global()
        assert possible
    except OutOfPages:
        assert not possible
