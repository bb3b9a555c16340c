"""Any order of operations on scheduler, page pool and prefix cache leaves every page to the right
text.

Unlike the random traffic of `test_scheduler.py`, texts here continue and leave earlier ones at
every place around a page's end, and draws differ. After each operation all holders are counted from
scratch, out of the page tables and the tree, and every page that somebody may read is compared with
what was written there: keys and values of a position depend on the salt and all text up to it.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.messages import FinishReason
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.prefix_cache import Block
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledSequence, Scheduler
from bezel.engine.sequence import Sequence

EOS = 1
LOCAL, GLOBAL = "local", "global"
Page = tuple[str, int]
Text = int  # of a position: hash of salt and tokens up to it


def texts_of(salt: str, token_ids: Iterable[int]) -> list[Text]:
    """What a position's keys and values depend on, for each."""
    texts, text = [], hash(salt)
    for token_id in token_ids:
        text = hash((text, token_id))
        texts.append(text)
    return texts


def walk(blocks: Iterable[Block]) -> Iterator[Block]:
    pending = list(blocks)
    while pending:
        block = pending.pop()
        yield block
        pending += block.children.values()


def text_before(block: Block) -> list[int]:
    """All tokens up to the block's end."""
    pieces: list[tuple[int, ...]] = []
    at: Block | None = block
    while at is not None:
        pieces.append(at.token_ids)
        at = at.parent
    return [*chain.from_iterable(reversed(pieces))]


class Checked:
    """A scheduler without a model, what its pages hold, and who should hold them."""

    def __init__(
        self,
        window: int = 16,
        num_sectors: int = 10,
        budget: int = 64,
        max_num_seqs: int = 4,
        caching: bool = True,
        cache_bytes: int | None = None,
    ) -> None:
        self.layout = KVLayout(window, 8, 32, local_page_bytes=24, global_page_bytes=32)
        self.pool = PagePool(self.layout, num_sectors * self.layout.sector_bytes)
        config = EngineConfig(
            max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, enable_prefix_caching=caching
        )
        self.scheduler = Scheduler(config, self.pool, cache_bytes)
        self.budget = budget
        self.alive: dict[str, Sequence] = {}
        self.known: list[tuple[str, list[int]]] = []  # salts and texts of all that ever came
        self.num_ended = 0
        self.num_preemptions = 0
        self.content: dict[Page, dict[int, Text]] = {}

    def add(self, token_ids: list[int], params: SamplingParams) -> bool:
        """False if it is longer than what a front end lets in."""
        most = self.layout.peak_pages(len(token_ids) + params.max_tokens)
        if self.layout.num_sectors(most) > self.pool.num_sectors:
            return False
        sequence = Sequence(
            request_id=f"s{len(self.known)}",
            token_ids=token_ids,
            params=params,
            seed=0,
            stop_token_ids=frozenset({EOS}),
            pages=PageTables(self.layout),
        )
        self.alive[sequence.request_id] = sequence
        self.known.append((params.cache_salt, token_ids))  # grows with what is drawn
        self.scheduler.add(sequence)
        return True

    def step(self, draws: Iterator[int]) -> None:
        step = self.scheduler.schedule()
        self.num_preemptions += step.num_preemptions
        assert 0 < step.num_tokens <= self.budget
        assert all(s.sequence.num_computed_tokens == s.start for s in step.sequences)
        self.check_holders()
        self._compute(step.sequences)
        sampled = self.scheduler.commit(step, [next(draws) for _ in step.sampled])
        for sequence in sampled:
            if sequence.finish_reason is not None:
                self._ended(sequence)

    def finish(self, name: str, reason: FinishReason) -> None:
        ended = self.scheduler.finish(name, reason)
        assert ended is self.alive[name]
        assert ended.finish_reason is reason
        self._ended(ended)
        assert self.scheduler.finish(name, reason) is None

    def drain(self, draws: Iterator[int]) -> None:
        """Run until nothing is left to do."""
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.step(draws)
        assert not self.alive and not self.scheduler.has_work, "everything accepted ends"
        assert self.pool.used == self.pool.idle

    def _ended(self, sequence: Sequence) -> None:
        self.num_ended += 1
        del self.alive[sequence.request_id]
        assert sequence.pages.held == PageCount(0, 0)
        size = self.layout.global_page_size
        assert sequence.num_cached_tokens % size == 0
        assert sequence.num_cached_tokens < sequence.num_prompt_tokens

    # What a step's layers would write and read, in their order.

    def _compute(self, sequences: list[ScheduledSequence]) -> None:
        holders = self._held() + self._cached()
        single = [s for s in sequences if s.num_tokens == 1]
        for s in sequences:
            first = s.sequence.pages.num_shared_global * self.layout.global_page_size
            self._write(GLOBAL, s, max(s.start, first), holders)
        for s in single:
            self._write(LOCAL, s, s.start, holders)
        for s in sequences:
            texts = texts_of(s.sequence.params.cache_salt, s.sequence.token_ids)
            self._check_global(s.sequence.pages.global_table, texts[: s.end])
            last = s.end if s.num_tokens == 1 else s.start
            first = max(0, s.start - self.layout.window + 1)
            self._check_local(s.local_read_table, texts, range(first, last))
        for s in sequences:
            if s.num_tokens > 1:
                oldest = min(s.anchor, s.end - 1)
                first = max(s.start, oldest - self.layout.window + 1)
                self._write(LOCAL, s, first, holders)
        for s in sequences:
            # The last query of a chunk, as layers without keys and values see it.
            texts = texts_of(s.sequence.params.cache_salt, s.sequence.token_ids)
            seen = range(max(0, s.end - self.layout.window), s.end)
            self._check_local(s.sequence.pages.local_table, texts, seen)

    def _write(self, kind: str, s: ScheduledSequence, first: int, holders: Counter[Page]) -> None:
        pages = s.sequence.pages
        table = pages.local_table if kind == LOCAL else pages.global_table
        size = self.layout.local_page_size if kind == LOCAL else self.layout.global_page_size
        texts = texts_of(s.sequence.params.cache_salt, s.sequence.token_ids)
        for position in range(first, s.end):
            page = (kind, table[position // size % len(table)])
            assert holders[page] == 1, f"{page} is written, but not by its only holder"
            self.content.setdefault(page, {})[position % size] = texts[position]

    def _check_global(self, table: list[int], texts: list[Text]) -> None:
        size = self.layout.global_page_size
        for position, text in enumerate(texts):
            assert self.content[GLOBAL, table[position // size]][position % size] == text

    def _check_local(self, table: list[int], texts: list[Text], positions: range) -> None:
        size = self.layout.local_page_size
        for position in positions:
            page = table[position // size % len(table)]
            assert self.content[LOCAL, page][position % size] == texts[position]

    # Who holds what.

    def _held(self, salt: str | None = None) -> Counter[Page]:
        """By sequences, of one salt if it is given."""
        held: Counter[Page] = Counter()
        for sequence in self.alive.values():
            if salt is None or sequence.params.cache_salt == salt:
                held.update((LOCAL, page) for page in sequence.pages.local_pages())
                held.update((GLOBAL, page) for page in sequence.pages.global_table)
        return held

    def _cached(self, salt: str | None = None) -> Counter[Page]:
        """By the prefix cache."""
        cached: Counter[Page] = Counter()
        for other, root in self.scheduler.sharing.cache._roots.items():
            if salt is None or other == salt:
                for block in walk(root.children.values()):
                    cached[GLOBAL, block.page] += 1
                    cached.update((LOCAL, page) for page in block.window or ())
        return cached

    def check_holders(self) -> None:
        """The pool counts what page tables and tree hold, no more and no less."""
        self.pool.check_integrity()
        held, cached = self._held(), self._cached()
        for name, kind in ((LOCAL, self.pool._local), (GLOBAL, self.pool._global)):
            holders = {page: n for (k, page), n in (held + cached).items() if k == name}
            assert kind.num_used == len(holders), "a page is used that nobody holds"
            assert kind.others == {page: n - 1 for page, n in holders.items() if n > 1}
            assert kind.cached == {page: n for (k, page), n in cached.items() if k == name}
            assert kind.num_idle == len(
                {page for k, page in cached - held if k == name}
                - {page for k, page in held if k == name}
            )
        assert not any(s.pages.held != PageCount(0, 0) for s in self.scheduler.waiting)

    def check_salts(self) -> None:
        """No page is held under two salts."""
        seen: set[Page] = set()
        for salt in {salt for salt, _ in self.known}:
            pages = set(self._held(salt) + self._cached(salt))
            assert seen.isdisjoint(pages)
            seen |= pages

    def check_content(self) -> None:
        """All that is computed, and all that may be resumed from, is what it is taken for."""
        for sequence in self.alive.values():
            texts = texts_of(sequence.params.cache_salt, sequence.token_ids)
            n = sequence.num_computed_tokens
            self._check_global(sequence.pages.global_table, texts[:n])
            window = range(max(0, n - self.layout.window + 1), n)
            self._check_local(sequence.pages.local_table, texts, window)
        for salt, root in self.scheduler.sharing.cache._roots.items():
            for block in walk(root.children.values()):
                self._check_block(block, salt)

    def _check_block(self, block: Block, salt: str) -> None:
        texts = texts_of(salt, text_before(block))
        size = self.layout.global_page_size
        start = len(texts) - size
        assert start == (block.depth - 1) * size
        content = self.content[GLOBAL, block.page]
        assert [content[i] for i in range(size)] == texts[start:]
        if block.window is not None:
            indices = self.layout.local_page_range(len(texts))
            table = dict(zip(indices, block.window, strict=True))
            for position in range(max(0, len(texts) - self.layout.window + 1), len(texts)):
                index, offset = divmod(position, self.layout.local_page_size)
                assert self.content[LOCAL, table[index]][offset] == texts[position]

    def check(self) -> None:
        self.check_holders()
        self.check_salts()
        self.check_content()

    def check_end(self, draws: Iterator[int]) -> None:
        self.drain(draws)
        self.check()
        assert self.num_ended == len(self.known)
        while self.scheduler.sharing.cache.evict():
            self.check_holders()
        assert self.pool.used == PageCount(0, 0)


def params_of(
    max_tokens: int, priority: int, salt: str, tenant: str, preamble: int
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        priority=priority,
        cache_salt=salt,
        tenant=tenant,
        num_preamble_tokens=preamble,
    )


PARAMS = st.builds(
    params_of,
    st.integers(1, 40),
    st.integers(0, 2),
    st.sampled_from(["", "", "other"]),
    st.sampled_from(["", "", "key"]),
    st.sampled_from([0, 0, 33, 64, 300]),
)
TOKENS = st.integers(2, 4)  # few, so that texts go the same way by chance too
# Around the ends of a local page, of a global page and of a window.
LENGTHS = st.one_of(
    st.integers(1, 150), st.sampled_from([7, 8, 9, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 129])
)


def repeat(token_ids: list[int]) -> Iterator[int]:
    """The tokens again and again."""
    while True:
        yield from token_ids


class CacheOperations(RuleBasedStateMachine):
    """Requests that come, continue others, leave them, end and go, in any order."""

    checked: Checked

    @initialize(
        window=st.sampled_from([2, 8, 9, 16, 33, 40]),
        num_sectors=st.integers(5, 16),
        budget=st.sampled_from([5, 17, 64, 500]),
        caching=st.sampled_from([True, True, True, False]),
        cache_bytes=st.sampled_from([None, None, 0, 400]),
    )
    def start(
        self, window: int, num_sectors: int, budget: int, caching: bool, cache_bytes: int | None
    ) -> None:
        self.checked = Checked(
            window, num_sectors, budget, caching=caching, cache_bytes=cache_bytes
        )

    @rule(num_tokens=LENGTHS, token_id=TOKENS, params=PARAMS)
    def add(self, num_tokens: int, token_id: int, params: SamplingParams) -> None:
        self.checked.add([token_id] * num_tokens, params)

    @precondition(lambda self: self.checked.known)
    @rule(which=st.integers(0, 99), keep=LENGTHS, more=LENGTHS, token_id=TOKENS, params=PARAMS)
    def leave_another(
        self, which: int, keep: int, more: int, token_id: int, params: SamplingParams
    ) -> None:
        """Go the same way as an earlier text for a while, and then perhaps another."""
        _, token_ids = self.checked.known[which % len(self.checked.known)]
        self.checked.add([*token_ids[:keep], *[token_id] * more], params)

    @precondition(lambda self: self.checked.known)
    @rule(which=st.integers(0, 99), more=st.lists(TOKENS, min_size=1, max_size=40), params=PARAMS)
    def continue_another(self, which: int, more: list[int], params: SamplingParams) -> None:
        """The next turn of a chat, or of one that is under way."""
        _, token_ids = self.checked.known[which % len(self.checked.known)]
        self.checked.add([*token_ids, *more], params)

    @precondition(lambda self: self.checked.scheduler.has_work)
    @rule(num_steps=st.integers(1, 12), draws=st.lists(TOKENS, min_size=1, max_size=7))
    def run(self, num_steps: int, draws: list[int]) -> None:
        for _ in range(num_steps):
            if self.checked.scheduler.has_work:
                self.checked.step(repeat(draws))
                self.checked.check()

    @precondition(lambda self: self.checked.alive)
    @rule(which=st.integers(0, 99), reason=st.sampled_from([FinishReason.ABORT, FinishReason.STOP]))
    def finish(self, which: int, reason: FinishReason) -> None:
        names = list(self.checked.alive)
        self.checked.finish(names[which % len(names)], reason)

    @precondition(lambda self: self.checked.scheduler.has_work)
    @rule(token_id=TOKENS)
    def let_idle(self, token_id: int) -> None:
        self.checked.drain(repeat([token_id, token_id, token_id, EOS]))

    @invariant()
    def check(self) -> None:
        self.checked.check()

    def teardown(self) -> None:
        if hasattr(self, "checked"):
            self.checked.check_end(repeat([2, 3]))


CacheOperations.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, report_multiple_bugs=False
)
TestCacheOperations = CacheOperations.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_chats_over_a_small_pool(seed: int) -> None:
    """A few users' chats over tiny pools, turn by turn, with retries from earlier turns; hits,
    evictions and preemptions do happen."""
    rng = random.Random(seed)
    checked = Checked(window=16, num_sectors=8 + seed, budget=48)
    sharing = checked.scheduler.sharing
    draws = iter(lambda: EOS if rng.random() < 0.01 else rng.randrange(2, 4), None)
    for _ in range(150):
        salt = rng.choice(["", "", "other"])
        texts = [[2] * 40, *(t for s, t in checked.known if s == salt and rng.random() < 0.3)]
        text = rng.choice(texts)
        keep = rng.choice([len(text), len(text), rng.randrange(1, len(text) + 1)])
        more = [rng.randrange(2, 5) for _ in range(rng.randrange(1, 50))]
        params = params_of(rng.randrange(1, 60), rng.randrange(3), salt, "", 0)
        token_ids = [*text[:keep], *more]
        if rng.random() < 0.2:  # whole pages, the last of which mustn't be a hit
            token_ids = text[: keep // 32 * 32]
        checked.add(token_ids or [2], params)
        for _ in range(rng.randrange(8)):
            if checked.scheduler.has_work:
                checked.step(draws)
        if checked.alive and rng.random() < 0.1:
            checked.finish(rng.choice(list(checked.alive)), FinishReason.ABORT)
        checked.check()
    checked.check_end(draws)
    assert sharing.num_hit_tokens > 250 and sharing.cache.num_evicted > 20
    assert checked.num_preemptions > 0
