"""Random traffic through the scheduler: nothing lost, nothing mixed up, every window readable.

The last test keeps a model of the cache's content, slot by slot, and checks that each step would
read exactly the tokens its attention needs, in the order in which layers read and write.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.batch import Batch, WantedRows
from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.messages import FailureCause, FinishReason
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledSequence, ScheduledStep, Scheduler
from bezel.engine.sequence import Sequence, SequenceStatus
from bezel.kernels.kv_pages import NO_SLOT

TOKEN, EOS = 5, 1


def make_scheduler(
    window: int = 32,
    num_sectors: int = 20,
    budget: int = 64,
    max_num_seqs: int = 4,
    caching: bool = False,
    cache_bytes: int | None = None,
) -> Scheduler:
    layout = KVLayout(window, 8, 32, local_page_bytes=24, global_page_bytes=32)
    config = EngineConfig(
        max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, enable_prefix_caching=caching
    )
    return Scheduler(config, PagePool(layout, num_sectors * layout.sector_bytes), cache_bytes)


def make_sequence(
    scheduler: Scheduler, name: str, num_tokens: int, max_tokens: int = 4, priority: int = 0
) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=[TOKEN] * num_tokens,
        params=SamplingParams(max_tokens=max_tokens, priority=priority),
        seed=0,
        stop_token_ids=frozenset({EOS}),
        pages=PageTables(scheduler.pool.layout),
    )


def run_step(scheduler: Scheduler, token_id: int = TOKEN) -> ScheduledStep:
    step = scheduler.schedule()
    scheduler.commit(step, [token_id] * len(step.sampled))
    return step


def plan(step: ScheduledStep) -> dict[str, tuple[int, int]]:
    return {s.sequence.request_id: (s.start, s.end) for s in step.sequences}


def test_decodes_come_first_and_the_prompt_fills_the_budget() -> None:
    scheduler = make_scheduler(budget=10)
    scheduler.add(make_sequence(scheduler, "short", 3))
    scheduler.add(make_sequence(scheduler, "long", 20))
    assert plan(run_step(scheduler)) == {"short": (0, 3), "long": (0, 7)}
    assert plan(run_step(scheduler)) == {"short": (3, 4), "long": (7, 16)}
    assert plan(run_step(scheduler)) == {"short": (4, 5), "long": (16, 20)}
    assert plan(run_step(scheduler)) == {"short": (5, 6), "long": (20, 21)}


def test_first_come_first_served_up_to_max_num_seqs() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_sequence(scheduler, name, 2, max_tokens=2))
    assert set(plan(run_step(scheduler))) == {"a", "b"}
    assert set(plan(run_step(scheduler))) == {"a", "b"}
    assert set(plan(run_step(scheduler))) == {"c"}


def test_a_prompt_waits_until_all_of_it_fits_beside_what_is_promised() -> None:
    scheduler = make_scheduler(num_sectors=4, window=8, budget=16)  # 4 sectors of 96 bytes
    scheduler.add(make_sequence(scheduler, "a", 90))  # 2 local, 3 global pages: 2 sectors
    scheduler.add(make_sequence(scheduler, "b", 90))
    scheduler.add(make_sequence(scheduler, "c", 10))  # one page more than the arena has
    step = run_step(scheduler)
    assert plan(step) == {"a": (0, 16)}
    assert len(scheduler.waiting) == 2


def test_the_last_to_come_is_preempted_and_starts_again_in_order() -> None:
    scheduler = make_scheduler(num_sectors=3, window=8, budget=64)
    for name in "ab":
        scheduler.add(make_sequence(scheduler, name, 30, max_tokens=90))
    sequences = []
    preempted = 0
    while scheduler.has_work:
        step = run_step(scheduler)
        sequences.append(plan(step))
        preempted += step.num_preemptions
    assert preempted > 0
    assert sequences[-1].keys() == {"b"}, "the first to come finishes first"
    assert scheduler.pool.used == PageCount(0, 0)


def test_a_lone_sequence_whose_pages_lie_scattered_starts_afresh_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(scheduler, "a", 32, max_tokens=20)
    scheduler.add(sequence)
    run_step(scheduler)
    can_allocate = scheduler.pool.can_allocate
    monkeypatch.setattr(
        scheduler.pool,
        "can_allocate",
        lambda wanted: not sequence.pages.global_table and can_allocate(wanted),
    )
    step = run_step(scheduler)
    assert (step.num_preemptions, plan(step)) == (1, {"a": (0, 33)})


@pytest.mark.parametrize("budget", [20, 64, 100])
@pytest.mark.parametrize("window", [16, 32, 64])
def test_a_prompt_that_just_fits_is_computed_with_checkpoints_in_its_way(
    window: int, budget: int
) -> None:
    for num_tokens in range(40, 400, 13):
        layout = make_scheduler(window).pool.layout
        num_sectors = layout.num_sectors(layout.peak_pages(num_tokens + 8))
        scheduler = make_scheduler(window, num_sectors, budget, caching=True)
        scheduler.add(make_sequence(scheduler, "a", num_tokens, max_tokens=8))
        steps = [run_step(scheduler) for _ in range(100) if scheduler.has_work]
        assert not scheduler.has_work and sum(step.num_preemptions for step in steps) <= 1


def test_the_lowest_priority_is_admitted_first_and_equal_ones_in_order() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    priorities = {"a": 0, "b": 5, "c": -3, "d": 0, "e": -3, "f": 5, "g": 2}
    for name, priority in priorities.items():
        scheduler.add(make_sequence(scheduler, name, 2, max_tokens=1, priority=priority))
    order = []
    while scheduler.has_work:
        order += plan(run_step(scheduler))
    assert order == ["c", "e", "a", "d", "g", "b", "f"]


def test_the_budget_goes_to_the_lowest_priority_first() -> None:
    scheduler = make_scheduler(budget=10)
    scheduler.add(make_sequence(scheduler, "slow", 30, priority=1))
    assert plan(run_step(scheduler)) == {"slow": (0, 10)}
    scheduler.add(make_sequence(scheduler, "fast", 8))
    assert plan(run_step(scheduler)) == {"slow": (10, 20)}, "it doesn't make way for one that waits"
    scheduler.finish("slow", FinishReason.ABORT)

    scheduler = make_scheduler(budget=16)
    scheduler.add(make_sequence(scheduler, "slow", 30, priority=1))
    scheduler.add(make_sequence(scheduler, "fast", 30, priority=0))
    assert plan(run_step(scheduler)) == {"fast": (0, 16)}
    assert plan(run_step(scheduler)) == {"fast": (16, 30), "slow": (0, 2)}
    assert plan(run_step(scheduler)) == {"fast": (30, 31), "slow": (2, 17)}


@pytest.mark.parametrize(
    ("priorities", "finishing"),
    [
        ({"a": 0, "b": 0, "c": 0}, "abc"),
        ({"a": 9, "b": 0, "c": 0}, "bca"),
        ({"a": 0, "b": 1, "c": -1}, "acb"),
    ],
)
def test_the_last_in_rank_is_preempted(priorities: dict[str, int], finishing: str) -> None:
    """Three that started one after the other, in an arena for about one and a half."""
    scheduler = make_scheduler(num_sectors=4, window=8, budget=64)
    for name, priority in priorities.items():
        scheduler.add(make_sequence(scheduler, name, 20, max_tokens=90, priority=priority))
        run_step(scheduler)
    assert len(scheduler.running) == 3
    ended, victims = [], set()
    while scheduler.has_work:
        before = list(scheduler.running)
        step = scheduler.schedule()
        for victim in {*before} - {*scheduler.running}:
            victims.add(victim.request_id)
            assert all(sequence.rank < victim.rank for sequence in scheduler.running)
        for sequence in scheduler.commit(step, [TOKEN] * len(step.sampled)):
            if sequence.finish_reason is not None:
                ended.append(sequence.request_id)
    assert "".join(ended) == finishing
    assert finishing[-1] in victims and finishing[0] not in victims


def test_ten_thousand_waiting_are_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for i in range(10_000):
        scheduler.add(make_sequence(scheduler, f"s{i}", 2, max_tokens=2, priority=i * 7919 % 10))
    num_ranks = 0
    rank = Sequence.rank.fget
    assert rank is not None

    def counting_rank(sequence: Sequence) -> tuple[int, int]:
        nonlocal num_ranks
        num_ranks += 1
        return rank(sequence)

    monkeypatch.setattr(Sequence, "rank", property(counting_rank))
    run_step(scheduler)
    scheduler.add(make_sequence(scheduler, "late", 2, priority=5))
    scheduler.finish("late", FinishReason.ABORT)
    scheduler.finish("s4999", FinishReason.ABORT)
    run_step(scheduler)
    assert num_ranks < 100


def test_a_sequence_without_a_draw_ends_in_an_error_alone() -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(scheduler, name, 3) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    step = scheduler.schedule()
    scheduler.commit(step, [TOKEN, FailureCause.ENGINE, TOKEN])
    assert [s.finish_reason for s in sequences] == [None, FinishReason.ERROR, None]
    assert [s.failure for s in sequences] == [None, FailureCause.ENGINE, None]
    assert [s.num_output_tokens for s in sequences] == [1, 0, 1]
    assert set(plan(run_step(scheduler))) == {"a", "c"}
    scheduler.pool.check_integrity()


def test_the_prefix_cache_keeps_to_its_limit() -> None:
    scheduler = make_scheduler(num_sectors=200, caching=True, cache_bytes=1000)
    layout = scheduler.pool.layout
    most = 0
    for i in range(12):
        sequence = make_sequence(scheduler, f"s{i}", 60)
        sequence.token_ids[:] = [i + 2] * 60
        scheduler.add(sequence)
        while scheduler.has_work:
            run_step(scheduler)
            idle_bytes = layout.num_bytes(scheduler.pool.idle)
            assert idle_bytes <= 1000
            most = max(most, idle_bytes)
    assert most > 500


def test_stop_tokens_lengths_and_min_tokens_end_a_sequence() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(scheduler, "a", 2, max_tokens=3)
    scheduler.add(sequence)
    run_step(scheduler, EOS)
    assert sequence.finish_reason is FinishReason.STOP

    sequence = make_sequence(scheduler, "b", 2, max_tokens=3)
    scheduler.add(sequence)
    for _ in range(3):
        run_step(scheduler)
    assert sequence.finish_reason is FinishReason.LENGTH
    assert not scheduler.has_work


def test_abort_in_every_phase() -> None:
    scheduler = make_scheduler(budget=8, max_num_seqs=1)
    queued, prefilling, decoding = (make_sequence(scheduler, n, 12) for n in ("q", "p", "d"))
    scheduler.add(decoding)
    run_step(scheduler), run_step(scheduler)
    assert decoding.num_uncomputed_tokens == 1
    assert scheduler.finish("d", FinishReason.ABORT) is decoding

    scheduler.add(prefilling)
    scheduler.add(queued)
    run_step(scheduler)
    assert prefilling.num_computed_tokens == 8 and queued.status is SequenceStatus.WAITING
    scheduler.finish("q", FinishReason.ABORT)
    scheduler.finish("p", FinishReason.ABORT)
    assert not scheduler.has_work
    assert scheduler.pool.used == PageCount(0, 0)
    assert scheduler.finish("p", FinishReason.ABORT) is None, "only one ending each"


Text = tuple[str, int]


def text_at(sequence: Sequence, position: int) -> Text:
    """Salt and text up to a position, for comparisons."""
    return sequence.params.cache_salt, hash(tuple(sequence.token_ids[: position + 1]))


@dataclass
class CacheModel:
    """What stands at which slot, per kind: keys and values of a token depend on all text up to it,
    and on nothing else."""

    layout: KVLayout
    local: dict[int, Text] = field(default_factory=dict)
    global_: dict[int, Text] = field(default_factory=dict)

    def run(self, step: ScheduledStep) -> None:
        batch = Batch.build(step, self.layout, torch.device("cpu"))
        for s, row in self._rows(step, batch):
            self._write(self.global_, s, batch.global_.slot_mapping_T[row].tolist())
            if s.num_tokens == 1:
                slots = batch.local.slot_mapping_T[row].tolist()
                assert slots[0] != NO_SLOT
                self._write(self.local, s, slots)
        for i, (s, _) in enumerate(self._rows(step, batch)):
            self._check_global(s, batch.global_.page_table_SP[i].tolist())
            last = s.end if s.num_tokens == 1 else s.start
            self._check_local(s, last, batch.local.page_table_SP[i].tolist())
        for s, row in self._rows(step, batch):
            if s.num_tokens > 1:
                self._write(self.local, s, batch.local.slot_mapping_T[row].tolist())
        if batch.wanted is not None:
            self._check_wanted(step, batch, batch.wanted)

    def _check_wanted(self, step: ScheduledStep, batch: Batch, wanted: WantedRows) -> None:
        """Each row that is wanted finds what it sees in pages."""
        sampled = [s for s in step.sequences if s.is_sampled]
        rows = wanted.rows_N
        assert batch.sampled_rows_N is not None and rows.equal(batch.sampled_rows_N)
        assert wanted.batch.num_decodes == len(sampled) == len(wanted.batch.seq_lens_S)
        for name in ("token_ids_T", "positions_T"):
            assert getattr(wanted.batch, name).equal(getattr(batch, name)[rows])
        assert wanted.batch.seq_lens_S.tolist() == [s.end for s in sampled]
        size = self.layout.local_page_size
        for i, s in enumerate(sampled):
            self._check_global(s, wanted.batch.global_.page_table_SP[i].tolist())
            table = wanted.batch.local.page_table_SP[i].tolist()
            for position in range(max(0, s.end - self.layout.window), s.end):
                slot = table[position // size % len(table)] * size + position % size
                assert self.local[slot] == text_at(s.sequence, position)

    def _rows(self, step: ScheduledStep, batch: Batch) -> list[tuple[ScheduledSequence, slice]]:
        assert batch.cu_seqlens_q_C1 is not None
        n = batch.num_decodes
        chunks = [n + offset for offset in batch.cu_seqlens_q_C1.tolist()]
        offsets = [*range(n), *chunks]
        bounds = pairwise(offsets)
        return [(s, slice(*b)) for s, b in zip(step.sequences, bounds, strict=True)]

    def _write(self, cache: dict[int, Text], s: ScheduledSequence, slots: list[int]) -> None:
        for position, slot in zip(range(s.start, s.end), slots, strict=True):
            if slot != NO_SLOT:
                cache[slot] = text_at(s.sequence, position)

    def _check_local(self, s: ScheduledSequence, last: int, table: list[int]) -> None:
        size = self.layout.local_page_size
        for position in range(max(0, s.start - self.layout.window + 1), last):
            page = table[position // size % len(table)]
            slot = page * size + position % size
            assert self.local[slot] == text_at(s.sequence, position)

    def _check_global(self, s: ScheduledSequence, table: list[int]) -> None:
        size = self.layout.global_page_size
        for position in range(s.end):
            slot = table[position // size] * size + position % size
            assert self.global_[slot] == text_at(s.sequence, position)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 150), st.integers(1, 40)),
        st.tuples(st.just("step"), st.integers(0, 1), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
    ),
    min_size=1,
    max_size=40,
)


def distinct_pages(sequences: list[Sequence]) -> PageCount:
    """Pages held by any of the sequences."""
    tables = [sequence.pages for sequence in sequences]
    local = {page for table in tables for page in table.local_pages()}
    return PageCount(len(local), len({page for table in tables for page in table.global_table}))


@settings(max_examples=200, deadline=None)
@given(
    window=st.sampled_from([2, 5, 8, 9, 32, 40]),
    budget=st.sampled_from([4, 7, 40, 500]),
    num_sectors=st.integers(5, 14),
    caching=st.booleans(),
    operations=OPERATIONS,
)
def test_random_traffic(
    window: int,
    budget: int,
    num_sectors: int,
    caching: bool,
    operations: list[tuple[str, int, int]],
) -> None:
    scheduler = make_scheduler(window, num_sectors, budget, max_num_seqs=4, caching=caching)
    scheduler.sharing.min_shared_tokens = scheduler.sharing.page_size
    pool, layout = scheduler.pool, scheduler.pool.layout
    capacity = num_sectors * layout.sector_bytes
    cache = CacheModel(layout)
    alive: dict[str, Sequence] = {}
    ended: list[str] = []

    def check(mid_step: bool = False) -> None:
        pool.check_integrity()
        held = [sequence.pages.held for sequence in alive.values()]
        assert pool.used - pool.idle == distinct_pages(list(alive.values()))
        if not caching:
            assert pool.used == sum(held, PageCount(0, 0))
        assert layout.num_bytes(pool.used) <= capacity
        slack = layout.global_page_size // layout.local_page_size if caching else 0
        # In the middle of a step there are also pages that it reads and that nobody may reuse.
        most = layout.max_local_pages * (2 if caching and mid_step else 1) + slack
        assert all(h.local <= most for h in held)
        assert len(ended) == len(set(ended))
        for queue in (list(scheduler.waiting), scheduler.running):
            assert queue == sorted(queue, key=lambda sequence: sequence.rank)

    def step(token_id: int) -> None:
        scheduled = scheduler.schedule()
        assert 0 < scheduled.num_tokens <= budget
        check(mid_step=True)
        cache.run(scheduled)
        for sequence in scheduler.commit(scheduled, [token_id] * len(scheduled.sampled)):
            if sequence.finish_reason is not None:
                ended.append(sequence.request_id)
                del alive[sequence.request_id]
        check()

    for i, (kind, first, second) in enumerate(operations):
        if kind == "add":
            total = layout.peak_pages(first + second)
            if layout.num_sectors(total) > num_sectors:
                continue  # what the front end refuses: longer than max_model_len
            sequence = make_sequence(scheduler, f"s{i}", first, second, priority=first % 3)
            # Some begin alike and go different ways, some may share nothing.
            branch = 7 * second
            sequence.token_ids[branch:] = [6 + second % 3] * len(sequence.token_ids[branch:])
            sequence.params = msgspec.structs.replace(
                sequence.params,
                cache_salt=str(first % 2),
                tenant=str(first % 5 % 2),
                num_preamble_tokens=branch,
            )
            alive[sequence.request_id] = sequence
            scheduler.add(sequence)
        elif kind == "abort" and alive:
            name = list(alive)[first % len(alive)]
            scheduler.finish(name, FinishReason.ABORT)
            ended.append(name)
            del alive[name]
        elif kind == "step":
            for _ in range(second):
                if scheduler.has_work:
                    step(TOKEN)
        check()
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        step(TOKEN)
    assert not alive and not scheduler.has_work, "everything accepted ends"
    assert pool.used == pool.idle
    while scheduler.sharing.cache.evict():
        pool.check_integrity()
    assert pool.used == PageCount(0, 0), "blocks stay without a checkpoint below them"
