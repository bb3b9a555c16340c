"""The baselines of `benchmarks/round_robin.py` do what their docstrings say, in cases by hand."""

import sys
from itertools import takewhile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import round_robin
from cache_policies import bezel, clairvoyant
from cache_policies.sglang import Sglang
from cache_policies.trace import PAGE, Load, TooSmall, Turn, Writer, agents, chats, loads
from cache_policies.vllm import Layout, Pool, Vllm

from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.published import PUBLISHED

MODEL = ModelConfig.from_hf(PUBLISHED["gemma-4-31B"])
# Two local groups; a window is two local pages, and one global page is as long as that.
TINY = Layout(num_local_groups=2, global_pages=2, page_bytes=1, window=2 * PAGE + 1)


def text(*names: int) -> Turn:
    """A prompt of one page for each name and a token more; the answer is never computed."""
    num_tokens = len(names) * PAGE + 1
    return Turn(0, [0] * (num_tokens + 1), num_tokens, list(names), 0, 0)


def vllm(num_pages: int, retention: int | None = None, chunk: int = 1 << 20) -> Vllm:
    return Vllm(TINY, num_pages, retention, chunk)


def page_of(policy: Vllm, group: int, name: int) -> int:
    page = policy.pool.find(group, name)
    assert page is not None
    return page


def test_vllms_pages_are_taken_in_the_order_of_their_release() -> None:
    pool = Pool(4, 1)
    pages = [pool.take() for _ in range(4)]
    for name, page in enumerate(pages):
        pool.name(page, 0, name)
    pool.release([pages[2], pages[0]])
    pool.release([pages[3]])
    assert pool.find(0, 2) == pages[2], "a free page is found until it is taken"
    assert pool.take() == pages[2]
    assert pool.find(0, 2) is None
    pool.hold(pages[0])
    assert pool.take() == pages[3], "a page in use isn't taken"
    with pytest.raises(TooSmall):
        pool.take()


def test_vllms_pages_without_a_name_go_first() -> None:
    pool = Pool(3, 1)
    pages = [pool.take() for _ in range(3)]
    pool.name(pages[0], 0, 7)
    pool.release(pages)
    assert [pool.take() for _ in range(3)] == [pages[1], pages[2], pages[0]]


def test_vllm_frees_group_by_group_the_last_page_first() -> None:
    policy = vllm(20)
    policy.serve(text(1, 2, 3, 4))
    queue = [page for page in policy.pool.free if page in range(20)]
    expected = [page_of(policy, group, name) for group in (0, 1) for name in (4, 3, 2, 1)]
    expected += [page_of(policy, 2, name) for name in (4, 2)]
    assert queue[-10:] == expected


def test_vllm_frees_what_slid_out_before_the_end_of_a_request() -> None:
    policy = vllm(30, chunk=4 * PAGE)
    policy.serve(text(1, 2, 3, 4, 5, 6))
    queue = list(policy.pool.free)
    slid = [page_of(policy, group, name) for group in (0, 1) for name in (2, 1)]
    at_end = [page_of(policy, 0, name) for name in (6, 5, 4, 3)]
    places = [queue.index(page) for page in slid + at_end]
    assert places == sorted(places)


def test_vllms_hit_needs_a_whole_window_in_every_local_group() -> None:
    policy = vllm(40)
    longer = text(1, 2, 3, 4, 5, 6)
    policy.serve(longer)
    assert policy.hit(longer.names, longer.num_prompt) == (6 * PAGE, 6 * PAGE)
    # A hit ends where a global page does, and leaves a token to compute.
    assert policy.hit(longer.names, 6 * PAGE) == (4 * PAGE, 4 * PAGE)
    del policy.pool._found[1][5]
    assert policy.hit(longer.names, longer.num_prompt) == (4 * PAGE, 6 * PAGE)
    del policy.pool._found[0][3]
    assert policy.hit(longer.names, longer.num_prompt) == (2 * PAGE, 6 * PAGE)
    del policy.pool._found[2][2]
    assert policy.hit(longer.names, longer.num_prompt) == (0, 0)


def test_vllm_when_sparse_names_the_window_at_the_prompts_end_and_at_branches() -> None:
    policy = vllm(60, retention=0)
    policy.serve(text(1, 2, 3, 4, 5, 6))
    assert set(policy.pool._found[0]) == set(policy.pool._found[1]) == {5, 6}
    assert set(policy.pool._found[2]) == {2, 4, 6}
    # Global pages of 1 to 4 are there, no window: it is computed again, and now kept.
    assert policy.serve(text(1, 2, 3, 4, 7, 8)) == 0
    assert set(policy.pool._found[0]) == {3, 4, 5, 6, 7, 8}
    assert policy.serve(text(1, 2, 3, 4, 9, 10)) == 4 * PAGE


def test_vllms_dense_names_push_each_other_out_where_sparse_ones_fit() -> None:
    turns = [text(*range(100 * chat, 100 * chat + 10)) for chat in range(3)] * 3
    # 3 chats of 5 global pages and 2 windows of 2: 27 pages to keep, 25 more for one at work.
    dense, sparse = vllm(52), vllm(52, retention=0)
    assert [dense.serve(turn) for turn in turns] == [0] * 9
    assert [sparse.serve(turn) for turn in turns] == [0] * 3 + [10 * PAGE] * 6


def sglang(num_global: int, num_local: int, chunk: int = 100) -> Sglang:
    return Sglang(num_global, num_local, window=2, chunk=chunk * PAGE)


def test_sglang_drops_the_leaf_not_used_for_longest() -> None:
    policy = sglang(6, 100)
    for names in [(1, 2), (3, 4), (5, 6)]:
        policy.serve(text(*names))
    assert policy.serve(text(1, 2)) == 2 * PAGE
    policy.serve(text(7, 8))
    assert policy.match([3, 4])[1] == 0
    assert policy.match([1, 2])[1] == policy.match([5, 6])[1] == 2


def test_sglangs_local_slots_go_from_the_beginning_of_texts_first() -> None:
    policy = sglang(100, 6)
    policy.serve(text(1, 2, 3, 4))  # nodes (1, 2) and (3, 4)
    policy.serve(text(5, 6, 7, 8))
    assert policy.match([1, 2])[1] == 0, "a tombstone"
    assert policy.match([1, 2, 3, 4])[1] == 4, "which a window after it makes up for"
    assert policy.free_local == 0


def test_sglangs_hit_has_a_window_without_tombstones_or_none_at_all() -> None:
    policy = sglang(100, 100)
    policy.serve(text(1, 2, 3, 4, 5))
    assert policy.match([1])[1] == 1, "shorter than a window, from the beginning"
    policy.serve(text(1, 2, 3, 4, 5, 6, 7))
    first = next(policy._walk([1]))
    first.is_tombstone = True
    assert policy.match([1, 2])[1] == 0
    assert policy.match([1, 2, 3])[1] == 3
    assert policy.match([1, 2, 3, 4, 5, 6, 7])[1] == 7


def test_sglang_gives_tombstones_new_slots_when_their_text_runs_again() -> None:
    policy = sglang(100, 6)
    policy.serve(text(1, 2, 3, 4))
    policy.serve(text(5, 6, 7, 8))
    assert policy.serve(text(1, 2, 9)) == 0
    assert policy.match([1, 2, 9])[1] == 3
    held_global = sum(len(node.names) for node in policy._nodes)
    held_local = sum(len(node.names) for node in policy._local)
    assert (policy.free_global, policy.free_local) == (100 - held_global, 6 - held_local)


def test_sglang_keeps_what_a_request_at_work_has() -> None:
    policy = sglang(8, 8, chunk=2)
    policy.serve(text(1, 2))
    assert policy.serve(text(1, 2, 3, 4, 5, 6, 7, 8)) == 2 * PAGE
    with pytest.raises(TooSmall):
        policy.serve(text(1, 2, 3, 4, 5, 6, 7, 8, 9))


def test_sglangs_split_wastes_most_of_the_pool_on_windows() -> None:
    """737,280 bytes a token, where a cache without windows would take 901,120."""
    policy = Sglang.of(MODEL, 737_280 * PAGE * 100)
    assert (policy.free_global, policy.free_local) == (100, 80)


def test_pages_of_vllm_are_of_equal_bytes() -> None:
    assert Layout.of(MODEL) == Layout(5, 2, 10 * 262_144, 1024)


def test_the_clairvoyant_keeps_the_same_chats_of_equal_ones() -> None:
    writer = Writer()
    people = [writer.begin([]) for _ in range(4)]
    for turn in range(5):
        for chat in people:
            writer.turn(chat, 10 if turn else 5000)
    bytes_each = bezel.working_set(MODEL, Load(5376, 1))
    found = clairvoyant.serve_all(MODEL, 2 * bytes_each, writer.turns)
    known = [turn.num_known for turn in writer.turns]
    assert found * 2 == sum(known), "two of four, where dropping the oldest would find none"
    assert clairvoyant.serve_all(MODEL, 4 * bytes_each, writer.turns) == sum(known)


def _num_common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@pytest.mark.parametrize("turns", [chats(40, 6), agents(40, 4)])
def test_what_is_known_is_the_longest_beginning_that_came_before(turns: list[Turn]) -> None:
    for i, turn in enumerate(turns):
        common = [_num_common(turn.text, old.text) for old in turns[:i]]
        longest = min(max(common, default=0), turn.num_prompt - 1)
        assert turn.num_known == longest // PAGE * PAGE
    assert any(turn.num_known for turn in turns)


def test_a_load_is_what_later_turns_want() -> None:
    writer = Writer()
    instructions = writer.piece(2 * PAGE)
    one, other = writer.begin(instructions), writer.begin(instructions)
    for chat in (one, other, one):
        writer.turn(chat, 2 * PAGE, PAGE)
    assert list(loads(writer.turns)) == [Load(5 * PAGE, 1), Load(5 * PAGE, 1), Load(0, 0)]
    writer.turn(other, PAGE, PAGE)
    assert list(loads(writer.turns))[1] == Load(8 * PAGE, 2)


def test_bezel_finds_nearly_all_that_fits_where_vllm_found_nothing() -> None:
    turns = round_robin.round_robin(num_chats=8, num_turns=3)
    each = [row for row in round_robin.rows_of("", turns, [0.25, 0.75]) if not row.is_same_bytes]
    for row in each:
        found = row.found["Bezel"]
        assert found is not None and found > 0.95
        assert row.found["vLLM dense"] == 0
