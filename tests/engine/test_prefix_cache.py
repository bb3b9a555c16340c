"""What the prefix cache finds, keeps and gives up; the scheduler's tests show that it mixes nothing
up."""

import pytest

from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.page_pool import PagePool
from bezel.engine.prefix_cache import Block, PrefixCache

SIZE = 32
LAYOUT = KVLayout(16, 8, SIZE, local_page_bytes=24, global_page_bytes=32)


@pytest.fixture
def pool() -> PagePool:
    return PagePool(LAYOUT, 100 * LAYOUT.sector_bytes)


@pytest.fixture
def cache(pool: PagePool) -> PrefixCache:
    return PrefixCache(pool)


def remember(
    cache: PrefixCache, pool: PagePool, text: list[int], checkpoints: list[int], salt: str = ""
) -> Block:
    """As a sequence would that computes the text, with checkpoints after so many blocks, and ends.

    Returns its last block.
    """
    block = cache.root(salt)
    cache.enter(block)
    for start in range(0, len(text) - SIZE + 1, SIZE):
        page = pool.allocate_global()
        block = cache.extend(block, tuple(text[start : start + SIZE]), page)
        pool.free_global(page)
        if block.depth in checkpoints:
            window = [pool.allocate_local(), pool.allocate_local()]
            cache.add_checkpoint(block, window)
            for local in window:
                pool.free_local(local)
    cache.leave(block)
    pool.check_integrity()
    return block


def found(cache: PrefixCache, text: list[int], salt: str = "") -> tuple[int, int] | None:
    """Tokens up to the checkpoint, and tokens that match."""
    hit = cache.match(text, salt)
    if hit is None:
        return None
    return (hit.checkpoint.depth if hit.checkpoint else 0) * SIZE, hit.block.depth * SIZE


def test_the_deepest_checkpoint_that_leaves_a_token(cache: PrefixCache, pool: PagePool) -> None:
    text = list(range(4 * SIZE))
    remember(cache, pool, text, [1, 3])
    assert found(cache, text[:SIZE]) is None
    assert found(cache, text[: SIZE + 1]) == (SIZE, SIZE)
    assert found(cache, text[: 3 * SIZE]) == (SIZE, 2 * SIZE)
    assert found(cache, text[: 3 * SIZE + 1]) == (3 * SIZE, 3 * SIZE)
    assert found(cache, [*text[: 3 * SIZE], -1, *text]) == (3 * SIZE, 3 * SIZE)
    assert found(cache, [-1, *text]) is None


def test_salts_do_not_see_each_other(cache: PrefixCache, pool: PagePool) -> None:
    text = list(range(SIZE + 1))
    remember(cache, pool, text, [1], salt="a")
    assert found(cache, text, "a") == (SIZE, SIZE)
    assert found(cache, text) is None
    assert found(cache, text, "b") is None


def test_blocks_without_a_checkpoint_below_them_are_forgotten(
    cache: PrefixCache, pool: PagePool
) -> None:
    text = list(range(3 * SIZE))
    remember(cache, pool, text, [1])
    assert pool.used == pool.idle == PageCount(2, 1)
    assert cache.evict()
    assert pool.used == PageCount(0, 0)
    assert not cache.evict()


def test_a_block_in_use_stays(cache: PrefixCache, pool: PagePool) -> None:
    block = remember(cache, pool, list(range(2 * SIZE)), [2])
    cache.enter(block)
    assert cache.evict()
    assert pool.used == PageCount(0, 2)
    cache.leave(block)
    assert pool.used == PageCount(0, 0)


def test_what_costs_least_to_compute_again_goes_first(cache: PrefixCache, pool: PagePool) -> None:
    short = [1] * (SIZE + 1)
    long = [2] * (3 * SIZE + 1)
    remember(cache, pool, long, [3])
    remember(cache, pool, short, [1])
    cache.evict()
    assert found(cache, short) is None
    assert found(cache, long) == (3 * SIZE, 3 * SIZE)


def test_what_is_used_stays_longer(cache: PrefixCache, pool: PagePool) -> None:
    texts = [[i] * (SIZE + 1) for i in range(3)]
    for text in texts:
        remember(cache, pool, text, [1])
    for text in (texts[0], texts[2]):
        hit = cache.match(text, "")
        assert hit is not None and hit.checkpoint is not None
        cache.mark_used(hit.checkpoint)
    cache.evict()
    assert [found(cache, text) is None for text in texts] == [False, True, False]


def test_old_fame_fades(cache: PrefixCache, pool: PagePool) -> None:
    """Each eviction raises what newcomers count for; what was used often once goes in the end."""
    famous = [0] * (SIZE + 1)
    remember(cache, pool, famous, [1])
    hit = cache.match(famous, "")
    assert hit is not None and hit.checkpoint is not None
    for _ in range(4):
        cache.mark_used(hit.checkpoint)
    remember(cache, pool, [1] * (SIZE + 1), [1])
    for i in range(2, 20):
        remember(cache, pool, [i] * (SIZE + 1), [1])
        cache.evict()
    assert found(cache, famous) is None


def test_a_turn_that_the_chat_went_beyond_goes_before_its_newest(
    cache: PrefixCache, pool: PagePool
) -> None:
    text = list(range(6 * SIZE + 1))
    remember(cache, pool, text, [5, 6])
    cache.evict()
    assert found(cache, text) == (6 * SIZE, 6 * SIZE)
    other = [*text[: 5 * SIZE], *[-1] * SIZE]
    assert found(cache, other) == (0, 5 * SIZE)


def test_where_two_chats_part_is_worth_keeping(cache: PrefixCache, pool: PagePool) -> None:
    start = list(range(5 * SIZE))
    texts = [[*start, *[-i] * (SIZE + 1)] for i in (1, 2)]
    for text in texts:
        remember(cache, pool, text, [5, 6])
    cache.evict()
    assert found(cache, [*start, 7]) == (5 * SIZE, 5 * SIZE)


def test_only_an_unused_checkpoint_is_dropped(cache: PrefixCache, pool: PagePool) -> None:
    text = list(range(2 * SIZE + 1))
    block = remember(cache, pool, text, [2])
    cache.mark_used(block)
    cache.drop_checkpoint(block)
    assert found(cache, text) == (2 * SIZE, 2 * SIZE)
    other = remember(cache, pool, [7, *text], [2])
    cache.drop_checkpoint(other)
    assert found(cache, [7, *text]) is None
    assert pool.used == PageCount(2, 2)


def test_one_that_two_have_made_is_not_the_firsts_to_drop(
    cache: PrefixCache, pool: PagePool
) -> None:
    text = list(range(2 * SIZE + 1))
    block = remember(cache, pool, text, [2])
    assert remember(cache, pool, text, [2]) is block
    cache.drop_checkpoint(block)
    assert found(cache, text) == (2 * SIZE, 2 * SIZE)


def test_what_is_gone_leaves_nothing_behind(cache: PrefixCache, pool: PagePool) -> None:
    """Checkpoints come and go with every page of an answer, for months."""
    kept = list(range(SIZE + 1))
    remember(cache, pool, kept, [1])
    for i in range(5000):
        cache.drop_checkpoint(remember(cache, pool, [i, *kept], [1]))
    assert len(cache._heap) < 2000
    assert pool.used == PageCount(2, 1)
    assert cache.evict() and not cache.evict()


def hits_of_turns(num_texts: int, room: int, order: list[int]) -> list[bool]:
    """Whether each text was found whose turn it was, with room for `room` of them."""
    pool = PagePool(LAYOUT, 1000 * LAYOUT.sector_bytes)
    cache = PrefixCache(pool)
    texts = [[i] * (4 * SIZE + 1) for i in range(num_texts)]
    hits = []
    for i in order:
        hit = cache.match(texts[i], "")
        hits.append(hit is not None)
        if hit is not None and hit.checkpoint is not None:
            cache.mark_used(hit.checkpoint)
        else:
            remember(cache, pool, texts[i], [4])
        while cache.num_checkpoints > room:
            cache.evict()
    return hits


def test_texts_that_take_turns_are_found_in_part_if_not_all_fit() -> None:
    """Whoever always gives up the oldest finds none of them."""
    hits = hits_of_turns(10, 8, list(range(10)) * 40)
    assert sum(hits[200:]) > 200 * 0.4
    assert sum(hits_of_turns(10, 10, list(range(10)) * 40)) == 390


def test_texts_that_do_not_come_again_drive_out_none_that_do() -> None:
    order = [text for i in range(4, 400) for text in (i, i % 4)]
    hits = hits_of_turns(400, 8, order)
    assert not any(hits[0::2]) and all(hits[9::2])


def test_what_was_evicted_is_remembered_only_for_a_while(
    cache: PrefixCache, pool: PagePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bezel.engine.prefix_cache._MAX_REMEMBERED", 5)
    for i in range(20):
        remember(cache, pool, [i] * (SIZE + 1), [1])
    while cache.evict():
        pass
    assert len(cache._evicted) == 5
    remember(cache, pool, [19] * (SIZE + 1), [1])
    assert len(cache._evicted) == 4
