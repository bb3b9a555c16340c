"""Nobody waits for ever, whatever arrives after them: a victim of the lowest priority, and an
adversary that adds requests at every step.

The bound follows from `waiting_queue`: every `OLDEST_TURN`-th place is that of the one that has
waited longest, whatever its priority, its tenant and the cache say, and is kept for it until there
is room. Before the victim only those are older that were there before it. So it starts within

    OLDEST_TURN · (2 · requests there before it + 1)

places: one who is preempted takes a second, and is due then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import Scheduler
from bezel.engine.sequence import Sequence, SequenceStatus
from bezel.engine.waiting_queue import LONG_WAIT, OLDEST_TURN

LOWEST = 9  # the victim's priority
TENANTS = ["", "a", "b"]
LAYOUT = KVLayout(16, 8, 32, local_page_bytes=24, global_page_bytes=32)


@dataclass(frozen=True)
class Arrival:
    """A request of the adversary: of its text the first `num_alike` tokens are those of others."""

    num_tokens: int = 4
    max_tokens: int = 3
    priority: int = 0
    tenant: str = ""
    num_alike: int = 0


class Arena:
    """A scheduler under attack. Counts the places that it gives."""

    def __init__(
        self,
        num_sectors: int = 8,
        budget: int = 64,
        max_num_seqs: int = 3,
        caching: bool = True,
    ) -> None:
        config = EngineConfig(
            max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, enable_prefix_caching=caching
        )
        pool = PagePool(LAYOUT, num_sectors * LAYOUT.sector_bytes)
        self.scheduler = Scheduler(config, pool)
        self.num_started = 0
        self.sequences: list[Sequence] = []

    def fits(self, num_tokens: int) -> bool:
        num_sectors = LAYOUT.num_sectors(LAYOUT.peak_pages(num_tokens))
        return num_sectors <= self.scheduler.pool.num_sectors

    def add(self, arrival: Arrival) -> Sequence:
        assert self.fits(arrival.num_tokens + arrival.max_tokens)
        number = len(self.sequences)
        own = [3 + number] * (arrival.num_tokens - arrival.num_alike)
        sequence = Sequence(
            request_id=str(number),
            token_ids=[2] * min(arrival.num_alike, arrival.num_tokens) + own,
            params=SamplingParams(
                max_tokens=arrival.max_tokens, priority=arrival.priority, tenant=arrival.tenant
            ),
            seed=0,
            stop_token_ids=frozenset(),
            pages=PageTables(LAYOUT),
        )
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        before = {id(sequence) for sequence in self.scheduler.running}
        step = self.scheduler.schedule()
        assert step.sequences, "there is work, but nothing is scheduled"
        self.num_started += sum(id(s) not in before for s in self.scheduler.running)
        self.scheduler.commit(step, [2] * len(step.sampled))

    def num_unfinished(self) -> int:
        return len(self.scheduler.running) + len(self.scheduler.waiting)

    def bound(self) -> int:
        """Places within which one starts that comes now."""
        return LONG_WAIT + OLDEST_TURN * (2 * self.num_unfinished() + 1)

    def starts(self, sequence: Sequence, attack: Callable[[], None], most_places: int) -> None:
        """Under attack it gets a place, and no more than so many get one before."""
        before = self.num_started
        while sequence.status is SequenceStatus.WAITING:
            attack()
            self.step()
            assert self.num_started - before <= most_places, "starved"

    def ends(self, sequence: Sequence, attack: Callable[[], None], most_steps: int) -> None:
        """Under attack it ends within so many steps."""
        for _ in range(most_steps):
            if sequence.status is SequenceStatus.FINISHED:
                return
            attack()
            self.step()
        raise AssertionError("starved")

    def end(self) -> None:
        """All that came ends without the adversary's further doing."""
        for _ in range(20_000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert all(s.status is SequenceStatus.FINISHED for s in self.sequences)
        assert self.scheduler.pool.used - self.scheduler.pool.idle == PageCount(0, 0)


ARRIVALS = st.builds(
    Arrival,
    num_tokens=st.integers(1, 90),
    max_tokens=st.integers(1, 30),
    priority=st.integers(-2, LOWEST),
    tenant=st.sampled_from(TENANTS),
    num_alike=st.sampled_from([0, 0, 33, 64]),
)


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.lists(ARRIVALS, min_size=1, max_size=6),
    rate=st.integers(1, 3),
    num_before=st.integers(0, 6),
    steps_before=st.integers(0, 60),
    victim=st.builds(
        Arrival,
        num_tokens=st.integers(1, 150),
        max_tokens=st.integers(1, 20),
        priority=st.just(LOWEST),
        tenant=st.sampled_from([*TENANTS, "victim"]),
        num_alike=st.sampled_from([0, 64]),
    ),
    num_sectors=st.integers(6, 12),
    budget=st.sampled_from([8, 64]),
    max_num_seqs=st.integers(1, 4),
)
def test_the_victim_starts_and_ends(
    pattern: list[Arrival],
    rate: int,
    num_before: int,
    steps_before: int,
    victim: Arrival,
    num_sectors: int,
    budget: int,
    max_num_seqs: int,
) -> None:
    arena = Arena(num_sectors, budget, max_num_seqs)
    arrivals = cycle([a for a in pattern if arena.fits(a.num_tokens + a.max_tokens)] or [Arrival()])
    if not arena.fits(victim.num_tokens + victim.max_tokens):
        victim = Arrival(4, 3, LOWEST, victim.tenant)

    def attack() -> None:
        # As many as a queue lets in: the rest is refused at the door.
        for _ in range(rate if arena.num_unfinished() < 40 else 0):
            arena.add(next(arrivals))

    for _ in range(num_before):
        arena.add(next(arrivals))
    for _ in range(steps_before):
        attack()
        arena.step()
    most = arena.bound()
    sequence = arena.add(victim)
    arena.starts(sequence, attack, most)
    arena.ends(sequence, attack, most_steps=50 * most)
    arena.end()


@pytest.mark.parametrize("rival", ["", "rival"])
@pytest.mark.parametrize(
    "arrival",
    [
        Arrival(),
        Arrival(num_tokens=1, max_tokens=1),
        Arrival(num_tokens=70, num_alike=64),
        Arrival(num_tokens=30, max_tokens=60),
    ],
    ids=["short", "tiny", "hits", "long"],
)
def test_a_large_prompt_among_many_that_always_fit(rival: str, arrival: Arrival) -> None:
    """The victim needs nearly all pages, which are never free as long as others start."""
    arena = Arena(num_sectors=6, max_num_seqs=8)
    arrival = Arrival(
        arrival.num_tokens, arrival.max_tokens, tenant=rival, num_alike=arrival.num_alike
    )
    for _ in range(10):
        arena.add(arrival)
        arena.step()
    most = arena.bound()
    victim = arena.add(Arrival(num_tokens=90, max_tokens=20, priority=LOWEST))

    def attack() -> None:
        for _ in range(3 if arena.num_unfinished() < 40 else 0):
            arena.add(arrival)

    arena.starts(victim, attack, most)
    arena.ends(victim, attack, most_steps=50 * most)


def test_what_a_tenant_had_while_alone_is_not_held_against_it() -> None:
    """It was served much when nobody else wanted anything, paused, and comes back while another
    has work: it doesn't wait until the other has had as much."""
    arena = Arena()
    for _ in range(50):
        arena.add(Arrival(num_tokens=60, max_tokens=20, tenant="a"))
    arena.end()
    for _ in range(30):
        arena.add(Arrival(tenant="b"))
    arena.step()
    victim = arena.add(Arrival(tenant="a"))
    arena.starts(victim, lambda: None, most_places=4)


def test_what_priority_got_a_tenant_is_not_held_against_it_for_ever() -> None:
    """Tenant b has been waiting all the time, so it is served less than a; then a has the lowest
    priority and b goes on."""
    arena = Arena(max_num_seqs=1)
    for _ in range(10):
        arena.add(Arrival(tenant="b", priority=1))
    for _ in range(40):
        arena.add(Arrival(num_tokens=60, max_tokens=20, tenant="a"))
    while any(s.params.tenant == "a" for s in arena.scheduler.waiting):
        arena.step()
    most = arena.bound()
    victim = arena.add(Arrival(tenant="a", priority=LOWEST))

    def attack() -> None:
        for _ in range(4 if arena.num_unfinished() < 40 else 0):
            arena.add(Arrival(num_tokens=1, max_tokens=1, tenant="b"))

    arena.starts(victim, attack, most)
    arena.ends(victim, attack, most_steps=50 * most)


def test_new_tenants_without_end_do_not_starve_an_old_one() -> None:
    arena = Arena()
    for _ in range(20):
        arena.add(Arrival(num_tokens=60, max_tokens=20, tenant="a"))
    arena.add(Arrival(tenant="b", priority=1))
    arena.step()
    most = arena.bound()
    victim = arena.add(Arrival(tenant="a", priority=LOWEST))

    def attack() -> None:
        for _ in range(4 if arena.num_unfinished() < 40 else 0):
            arena.add(Arrival(tenant=str(len(arena.sequences))))

    arena.starts(victim, attack, most)
    arena.ends(victim, attack, most_steps=50 * most)


def test_whoever_is_preempted_again_and_again_gets_on() -> None:
    """The adversary waits until the victim has a place, and only then brings one that fits beside
    it, grows, and goes before it."""
    arena = Arena(num_sectors=3, budget=4, caching=False)
    victim = arena.add(Arrival(num_tokens=110, max_tokens=20, priority=LOWEST))

    def attack() -> None:
        if victim.status is SequenceStatus.RUNNING and arena.num_unfinished() == 1:
            arena.add(Arrival(num_tokens=1, max_tokens=80))

    arena.ends(victim, attack, most_steps=80 * 2 * OLDEST_TURN)
    assert victim.num_once_computed > 0, "never preempted"
