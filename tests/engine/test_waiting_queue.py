"""Who starts next, from one that is never looked through to ten tenants that want everything."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.kv_layout import KVLayout
from bezel.engine.page_tables import PageTables
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.sequence import Sequence
from bezel.engine.waiting_queue import OLDEST_TURN, WaitingQueue

LAYOUT = KVLayout(16, 8, 32, local_page_bytes=24, global_page_bytes=32)


class Arrivals:
    """Makes sequences, and has them start one after the other."""

    def __init__(self) -> None:
        self.queue = WaitingQueue()
        self.num_arrived = 0

    def add(self, name: str, tenant: str = "", priority: int = 0) -> Sequence:
        params = SamplingParams(max_tokens=1, priority=priority, tenant=tenant)
        sequence = Sequence(name, [1] * 10, params, 0, frozenset(), PageTables(LAYOUT))
        sequence.arrival = self.num_arrived
        self.num_arrived += 1
        self.queue.arrive(sequence)
        return sequence

    def start(self, cost: int = 10) -> Sequence:
        sequence = self.queue.first(1)[0]
        self.queue.start(sequence)
        self.queue.charge(sequence, cost)
        return sequence

    def order(self, num: int, cost: int = 10) -> list[str]:
        return [self.start(cost).request_id for _ in range(num)]


def test_tenants_take_turns_however_many_one_brings() -> None:
    arrivals = Arrivals()
    for i in range(6):
        arrivals.add(f"a{i}", "a")
    for i in range(2):
        arrivals.add(f"b{i}", "b")
    assert arrivals.order(8) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_who_asks_for_more_waits_longer() -> None:
    arrivals = Arrivals()
    for i in range(20):
        arrivals.add(f"a{i}", "a")
        arrivals.add(f"b{i}", "b")
    started = Counter[str]()
    for _ in range(20):
        tenant = arrivals.queue.first(1)[0].params.tenant
        arrivals.start(cost=30 if tenant == "a" else 10)
        started[tenant] += 1
    assert started == {"a": 5, "b": 15}


def test_what_was_left_unused_cannot_be_claimed_later() -> None:
    arrivals = Arrivals()
    for i in range(20):
        arrivals.add(f"a{i}", "a")
    arrivals.order(10)
    for i in range(5):
        arrivals.add(f"b{i}", "b")
    assert arrivals.order(6) == ["a10", "b0", "a11", "b1", "a12", "b2"]


def test_going_away_does_not_clear_the_account() -> None:
    arrivals = Arrivals()
    for name in ("a0", "a1"):
        arrivals.add(name, "a")
    arrivals.add("b0", "b")
    arrivals.add("b1", "b")
    greedy = arrivals.start(cost=100)
    assert greedy.request_id == "a0"
    arrivals.queue.leave(arrivals.start())  # b0
    gone = next(s for s in arrivals.queue if s.request_id == "a1")
    arrivals.queue.remove(gone)
    for sequence in (gone, greedy):
        arrivals.queue.leave(sequence)
    arrivals.add("a2", "a")
    assert arrivals.order(2) == ["b1", "a2"]


def test_priority_goes_before_fairness() -> None:
    arrivals = Arrivals()
    for i in range(3):
        arrivals.add(f"low{i}", "b", priority=1)
        arrivals.add(f"high{i}", "a")
    assert arrivals.order(6) == ["high0", "high1", "high2", "low0", "low1", "low2"]


def test_every_eighth_place_goes_to_the_oldest_which_keeps_it() -> None:
    arrivals = Arrivals()
    old = arrivals.add("old", priority=9)
    for i in range(20):
        arrivals.add(f"new{i}")
    order = arrivals.order(OLDEST_TURN)
    assert order == [*(f"new{i}" for i in range(OLDEST_TURN - 1)), "old"]
    assert old.is_due
    late = arrivals.add("late", priority=-5)
    arrivals.queue.add(old)  # preempted
    assert arrivals.order(2) == ["old", "late"]
    assert not late.is_due


def test_the_oldest_of_equals_is_not_raised_above_them() -> None:
    arrivals = Arrivals()
    sequences = [arrivals.add(str(i), tenant="ab"[i % 2]) for i in range(20)]
    arrivals.order(20)
    assert not any(sequence.is_due for sequence in sequences)


def test_only_those_alike_may_go_before_the_first() -> None:
    arrivals = Arrivals()
    for i, (tenant, priority) in enumerate([("a", 0), ("b", 0), ("a", 0), ("a", 1), ("a", 0)]):
        arrivals.add(str(i), tenant, priority)
    assert [s.request_id for s in arrivals.queue.first(3)] == ["0", "2", "4"]
    assert [s.request_id for s in arrivals.queue.first(2)] == ["0", "2"]
    assert [s.request_id for s in arrivals.queue] == ["0", "1", "2", "4", "3"]


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    costs=st.lists(st.integers(1, 50), min_size=5, max_size=5),
)
def test_backlogged_tenants_are_served_alike(rates: list[int], costs: list[int]) -> None:
    """However fast they ask and however much for: within one of the largest requests."""
    arrivals = Arrivals()
    served = Counter[str]()
    for _ in range(3):
        for tenant, rate in enumerate(rates):
            for i in range(40 * rate):
                arrivals.add(f"{tenant}-{i}", str(tenant))
    for _ in range(40):
        tenant = arrivals.queue.first(1)[0].params.tenant
        cost = costs[int(tenant)]
        arrivals.start(cost)
        served[tenant] += cost
        levels = [served[str(i)] for i in range(len(rates))]
        assert max(levels) - min(levels) <= max(costs)
