"""Prompts with the same beginning that come together: computed once, and nobody hangs on it."""

import msgspec
import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import KVLayout
from bezel.engine.messages import FinishReason
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import LOOK_AHEAD, Scheduler
from bezel.engine.sequence import Sequence

SIZE = 32
LAYOUT = KVLayout(40, 8, SIZE, local_page_bytes=24, global_page_bytes=32)
SHARED = list(range(1000, 1000 + 10 * SIZE))


def make_scheduler(budget: int = 4000, mixed: int = 0, max_num_seqs: int = 64) -> Scheduler:
    config = EngineConfig(
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        max_num_mixed_prefill_tokens=mixed,
    )
    return Scheduler(config, PagePool(LAYOUT, 2000 * LAYOUT.sector_bytes))


def add(scheduler: Scheduler, name: str, text: list[int], max_tokens: int = 1, **params: object):
    sequence = Sequence(
        name, list(text), SamplingParams(max_tokens=max_tokens), 0, frozenset(), PageTables(LAYOUT)
    )
    sequence.params = msgspec.structs.replace(sequence.params, **params)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> dict[str, tuple[int, int]]:
    scheduled = scheduler.schedule()
    scheduler.commit(scheduled, [7] * len(scheduled.sampled))
    return {s.sequence.request_id: (s.start, s.end) for s in scheduled.sequences}


def steps(scheduler: Scheduler) -> list[dict[str, tuple[int, int]]]:
    done = []
    while scheduler.has_work:
        done.append(step(scheduler))
        assert len(done) < 1000
    return done


def test_a_beginning_that_many_share_is_computed_once() -> None:
    scheduler = make_scheduler()
    for i in range(16):
        add(scheduler, str(i), [*SHARED, *[i] * 50])
    end = len(SHARED)
    assert step(scheduler) == {"0": (0, end)}
    assert step(scheduler) == {str(i): (end, end + 50) for i in range(16)}


def test_one_that_comes_while_it_is_computed_waits_for_it() -> None:
    scheduler = make_scheduler(budget=64)
    add(scheduler, "a", [*SHARED, *[1] * 50])
    step(scheduler)
    add(scheduler, "b", [*SHARED, *[2] * 50])
    computed = sum(end - start for s in steps(scheduler) for start, end in s.values())
    assert computed == len(SHARED) + 2 * 50 - 64


@pytest.mark.parametrize("num_shared", [3, 4])
def test_too_little_to_share_is_not_waited_for(num_shared: int) -> None:
    scheduler = make_scheduler()
    for i in range(2):
        add(scheduler, str(i), [*SHARED[: num_shared * SIZE], *[i] * 50])
    assert len(step(scheduler)) == (2 if num_shared == 3 else 1)


@pytest.mark.parametrize("how", ["salt", "logprobs", "disabled"])
def test_who_may_not_share_does_not_wait(how: str) -> None:
    scheduler = make_scheduler()
    scheduler.sharing.is_enabled = how != "disabled"
    for i in range(2):
        params: dict[str, object] = {}
        if how == "salt":
            params["cache_salt"] = str(i)
        if how == "logprobs" and i:
            params["prompt_logprobs"] = 0
        add(scheduler, str(i), [*SHARED, *[i] * 50], **params)
    assert len(step(scheduler)) == 2


def test_when_the_leader_leaves_the_others_go_on() -> None:
    scheduler = make_scheduler(budget=64)
    for i in range(3):
        add(scheduler, str(i), [*SHARED, *[i] * 50])
    assert step(scheduler) == {"0": (0, 64)}
    scheduler.finish("0", FinishReason.ABORT)
    assert step(scheduler).keys() == {"1"}
    assert {name for s in steps(scheduler) for name in s} == {"1", "2"}


def test_those_behind_go_first_meanwhile() -> None:
    scheduler = make_scheduler(budget=128)
    for i in range(2):
        add(scheduler, str(i), [*SHARED, *[i] * 50])
    add(scheduler, "other", [5] * 60)
    assert step(scheduler) == {"0": (0, 128)}
    assert step(scheduler) == {"0": (128, 256)}
    assert step(scheduler) == {"0": (256, 320), "other": (0, 60)}


def test_what_the_cache_has_goes_first_but_not_for_ever() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, "first", SHARED)
    steps(scheduler)
    add(scheduler, "unknown", [3] * 100)
    for i in range(LOOK_AHEAD + 3):
        add(scheduler, f"known{i}", [*SHARED, i])
    order = [name for s in steps(scheduler) for name in s]
    assert order.index("unknown") == LOOK_AHEAD
    assert sorted(order) == sorted(set(order))


def test_a_preamble_is_there_for_the_second_who_brings_it() -> None:
    scheduler = make_scheduler()
    preamble = len(SHARED) - 10
    add(scheduler, "a", [*SHARED, *[1] * 50], num_preamble_tokens=preamble)
    steps(scheduler)
    other = add(scheduler, "b", [*SHARED[:preamble], *[2] * 50], num_preamble_tokens=preamble)
    steps(scheduler)
    assert other.num_cached_tokens == preamble // SIZE * SIZE


def test_a_short_preamble_is_not_worth_a_checkpoint() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", [*SHARED, 1], num_preamble_tokens=3 * SIZE)
    steps(scheduler)
    assert scheduler.sharing.cache.num_checkpoints == 1  # that of the end


def test_beside_sequences_that_decode_a_lone_prompt_gets_a_smaller_budget() -> None:
    scheduler = make_scheduler(budget=200, mixed=30)
    add(scheduler, "talks", [1] * 10, max_tokens=4)
    add(scheduler, "long", [2] * 400)
    assert step(scheduler) == {"talks": (0, 10), "long": (0, 190)}
    for start in (190, 220, 250):
        assert step(scheduler)["long"] == (start, start + 30)
    assert step(scheduler) == {"long": (280, 400)}
    add(scheduler, "talks", [1] * 10, max_tokens=4)
    assert step(scheduler) == {"talks": (0, 10)}
    for i in range(2):
        add(scheduler, f"new{i}", [3 + i] * 20)
    assert step(scheduler) == {"talks": (10, 11), "new0": (0, 20), "new1": (0, 20)}
    add(scheduler, "late", [5] * 100)
    assert step(scheduler) == {"talks": (11, 12), "late": (0, 30)}


def test_hits_are_counted_whole_and_of_global_pages() -> None:
    scheduler = make_scheduler()
    for i in range(3):
        add(scheduler, str(i), [*SHARED[: 3 * SIZE], *[i] * 50])
        steps(scheduler)
    sharing = scheduler.sharing
    # The second finds pages without a window, the third the checkpoint that the second has made.
    assert (sharing.num_hit_tokens, sharing.num_global_hit_tokens) == (3 * SIZE, 6 * SIZE)
    assert sharing.num_queried_tokens == 3 * (3 * SIZE + 50)
