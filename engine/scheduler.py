"""Decides what the next step computes.

One token budget a step: sequences that decode come first, then prompts under way, then waiting
ones as `waiting_queue` orders them. A prompt longer than what is left of the budget goes in chunks;
those of a lone prompt are smaller beside sequences that decode and have to wait for them. When
pages run out the last in rank gives up all of its own and waits to be recomputed; one that merely
waits never takes another's place. No tensors, no clock; the same calls on the same state give the
same step.
"""

from array import array
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from bezel.engine import joint_prefill
from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import PageCount
from bezel.engine.messages import FailureCause, FinishReason
from bezel.engine.page_pool import PagePool
from bezel.engine.prefix_cache import PrefixHit
from bezel.engine.prefix_sharing import PrefixSharing
from bezel.engine.sequence import Sequence, SequenceStatus
from bezel.engine.waiting_queue import WaitingQueue, rank_of, remove_sorted

# Of those next in line the one may go first of whose text the cache has most.
LOOK_AHEAD = 8
# Of those next in line as many are looked at for a beginning they share with one that starts.
MAX_LED = 32


@dataclass(slots=True)
class ScheduledSequence:
    """Positions [start, start + num_tokens) of a sequence; `local_read_table` as before the step
    if the chunk has several tokens, `anchor` a position whose window is kept (see `page_tables`).
    """

    sequence: Sequence
    start: int
    num_tokens: int
    local_read_table: "array[int]"
    anchor: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_prefill(self) -> bool:
        """Prompt tokens, or tokens computed again after a preemption."""
        return self.num_tokens > 1 or self.start < self.sequence.num_prompt_tokens

    @property
    def is_sampled(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that a new one is drawn."""
        return self.end == self.sequence.num_tokens

    @property
    def prompt_positions(self) -> range:
        """Positions that predict a token of the prompt, and didn't already before a preemption."""
        sequence = self.sequence
        first = max(self.start, sequence.num_once_computed)
        return range(first, min(self.end, sequence.num_prompt_tokens - 1))


@dataclass(slots=True)
class ScheduledStep:
    """Work of one step: single tokens first, then chunks, in the order of `sequences`."""

    sequences: list[ScheduledSequence] = field(default_factory=list)
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_tokens for scheduled in self.sequences)

    @property
    def sampled(self) -> list[Sequence]:
        return [s.sequence for s in self.sequences if s.is_sampled]


class Scheduler:
    """Owns the queues and the page pool. Every added sequence leaves by `finish` or `commit`."""

    def __init__(
        self, config: EngineConfig, pool: PagePool, prefix_cache_bytes: int | None = None
    ) -> None:
        self._max_num_seqs = config.max_num_seqs
        self._token_budget = config.max_num_batched_tokens
        self._mixed_budget = config.max_num_mixed_prefill_tokens or self._token_budget
        self._max_chunk = config.long_prefill_token_threshold or self._token_budget
        self.pool = pool
        self.sharing = PrefixSharing(pool, config.enable_prefix_caching, prefix_cache_bytes)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in the order of ranks
        self._blocked: Sequence | None = None  # there was no room for it, and can't be yet
        self._num_added = 0
        self._by_id: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def add(self, sequence: Sequence) -> None:
        assert sequence.request_id not in self._by_id, f"{sequence.request_id} was added twice"
        self._by_id[sequence.request_id] = sequence
        sequence.arrival = self._num_added
        self._num_added += 1
        self.waiting.arrive(sequence)

    def finish(self, request_id: str, reason: FinishReason) -> Sequence | None:
        """End a sequence in whatever phase it is; None if it has already ended."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        else:
            remove_sorted(self.running, sequence, rank_of)
        self._end(sequence, reason)
        return sequence

    def schedule(self) -> ScheduledStep:
        """Choose the next step's tokens and take the pages they need."""
        step = ScheduledStep()
        chosen: dict[str, ScheduledSequence] = {}
        budget = self._token_budget
        # Lists first: preemption takes sequences out of `running` while this goes on.
        prefilling = [sequence for sequence in self.running if sequence.is_prefilling]
        decoding = [sequence for sequence in self.running if not sequence.is_prefilling]
        budget -= self._schedule_all(decoding, budget, step, chosen)
        if chosen and len(prefilling) + len(self.waiting) == 1:
            budget = min(budget, self._mixed_budget)
        budget -= self._schedule_all(prefilling, budget, step, chosen)
        # After a preemption the pages are spoken for, unless the last to run has preempted itself:
        # its pages lay scattered over sectors that it fills when it starts afresh.
        if not step.num_preemptions or not chosen:
            self._admit(budget, chosen)
        step.sequences = sorted(chosen.values(), key=lambda scheduled: scheduled.num_tokens > 1)
        return step

    def commit(
        self, step: ScheduledStep, token_ids: Iterable[int | FailureCause]
    ) -> list[Sequence]:
        """Book a computed step: `token_ids` are the draws for `step.sampled`, in that order; a
        cause ends a sequence for which none could be drawn.

        Returns the sampled sequences; those that ended have their `finish_reason` set.
        """
        for scheduled in step.sequences:
            sequence, end = scheduled.sequence, scheduled.end
            sequence.num_computed_tokens = end
            self.sharing.computed(sequence, scheduled.start, end, scheduled.anchor)
            sequence.pages.release_slid(self.pool)
            if scheduled.anchor != end:
                sequence.pages.release_anchor(end, self.pool)
            if scheduled.is_prefill:
                self._blocked = None  # more of its text may be in the cache now
            else:
                self.waiting.charge(sequence, 1)
        sampled = step.sampled
        for sequence, token_id in zip(sampled, token_ids, strict=True):
            if isinstance(token_id, int):
                reason = sequence.append(token_id)
            else:
                reason, sequence.failure = FinishReason.ERROR, token_id
            if reason is not None:
                remove_sorted(self.running, sequence, rank_of)
                self._end(sequence, reason)
        self.sharing.trim()
        return sampled

    def _schedule_all(
        self,
        sequences: Iterable[Sequence],
        budget: int,
        step: ScheduledStep,
        chosen: dict[str, ScheduledSequence],
    ) -> int:
        """Schedule running sequences one after the other; return the budget they took."""
        taken = 0
        for sequence in sequences:
            if taken == budget:
                break
            taken += self._schedule_running(sequence, budget - taken, step, chosen)
        return taken

    def _schedule_running(
        self,
        sequence: Sequence,
        budget: int,
        step: ScheduledStep,
        chosen: dict[str, ScheduledSequence],
    ) -> int:
        """Schedule the next chunk, preempting others for its pages; return the budget it took."""
        returned = 0
        while sequence.status is SequenceStatus.RUNNING:
            scheduled = self._take_pages(sequence, budget)
            if scheduled is not None:
                chosen[sequence.request_id] = scheduled
                return scheduled.num_tokens - returned
            victim = self.running[-1]
            undone = chosen.pop(victim.request_id, None)
            returned += undone.num_tokens if undone else 0
            if len(self.running) == 1:
                # Not even alone: its pages lie scattered over sectors, and checkpoints hold on to
                # some. On its own it fits, for it wouldn't have been accepted otherwise.
                victim.is_private = True
            self._preempt(victim)
            step.num_preemptions += 1
        return -returned

    def _take_pages(self, sequence: Sequence, budget: int) -> ScheduledSequence | None:
        start = sequence.num_computed_tokens
        if sequence.pages.is_steady(start + 1) and not sequence.is_prefilling:
            # As a rule; what follows would come to the same.
            return ScheduledSequence(sequence, start, 1, sequence.pages.local_table, start + 1)
        end = start + min(sequence.num_uncomputed_tokens, self._max_chunk, budget)
        end, anchor = self.sharing.chunk(sequence, start, end)
        if not self._has_room(sequence, start, end, anchor):
            anchor = end  # rather no checkpoint than no chunk
            if not self._has_room(sequence, start, end, end):
                # Pages of its window that a checkpoint holds as well can't be used again.
                if not self.sharing.give_up_windows(sequence):
                    return None
                if not self._has_room(sequence, start, end, end):
                    return None
        read_table = sequence.pages.extend(start, end, self.pool, anchor)
        return ScheduledSequence(sequence, start, end - start, read_table, anchor)

    def _has_room(self, sequence: Sequence, start: int, end: int, anchor: int) -> bool:
        missing = sequence.pages.num_missing(start, end, self.pool, anchor)
        return self.sharing.make_room(missing)

    def _admit(self, budget: int, chosen: dict[str, ScheduledSequence]) -> None:
        """Start waiting sequences whose whole known text fits beside what is already promised."""
        while self.waiting and budget and len(self.running) < self._max_num_seqs:
            sequence = self._next(chosen)
            if sequence is None or (sequence is self._blocked and self.running):
                return
            hit = self.sharing.match(sequence)
            scheduled = self._begin(sequence, hit, budget)
            if scheduled is None and hit is not None and not self.running:
                # What it would share is in the way of its own pages.
                scheduled = self._begin(sequence, None, budget)
            if scheduled is None:
                self._blocked = sequence
                return
            self.waiting.start(sequence)
            self.waiting.charge(sequence, sequence.num_uncomputed_tokens)
            insort(self.running, sequence, key=rank_of)
            sequence.status = SequenceStatus.RUNNING
            chosen[sequence.request_id] = scheduled
            budget -= scheduled.num_tokens

    def _next(self, chosen: dict[str, ScheduledSequence]) -> Sequence | None:
        """Who starts next; None if all who may are waiting for what others are computing.

        One behind the first goes before it if the cache has much more of its text, which might be
        gone later; but only so many do.
        """
        first = self.waiting.first(LOOK_AHEAD)
        if not self.sharing.is_enabled:
            return first[0]
        for sequence in first:
            if sequence.expected_hit is None:
                self._look_at(sequence, chosen)
        ready = [sequence for sequence in first if not joint_prefill.is_led(sequence)]
        if not ready:
            return None
        best = max(ready, key=_expected_hit)
        gain = _expected_hit(best) - _expected_hit(ready[0])
        if gain < self.sharing.min_shared_tokens or ready[0].num_passed == LOOK_AHEAD:
            return ready[0]
        ready[0].num_passed += 1
        return best

    def _look_at(self, sequence: Sequence, chosen: dict[str, ScheduledSequence]) -> None:
        """Find out what the cache has of its text, and who is about to compute more of it."""
        hit = self.sharing.match(sequence)
        sequence.expected_hit = self.sharing.num_tokens(hit)
        for leader in self.running:
            if leader.is_prefilling:
                scheduled = chosen.get(leader.request_id)
                start = scheduled.end if scheduled else leader.num_computed_tokens
                joint_prefill.lead(leader, [sequence], start, self.sharing)

    def _begin(
        self, sequence: Sequence, hit: PrefixHit | None, budget: int
    ) -> ScheduledSequence | None:
        """The first chunk of a waiting sequence; None, and nothing taken, if there is no room."""
        self.sharing.begin(sequence, hit)
        scheduled = None
        if self.sharing.make_room(self._promised() + self._missing(sequence)):
            if self.sharing.is_enabled:
                start = sequence.num_computed_tokens
                others = islice(self.waiting, MAX_LED)
                joint_prefill.lead(sequence, others, start, self.sharing)
            scheduled = self._take_pages(sequence, budget)
        if scheduled is None:
            self._release(sequence)
        else:
            self.sharing.admitted(sequence, hit)
        return scheduled

    def _missing(self, sequence: Sequence) -> PageCount:
        """Pages that a sequence will still take for tokens it already has."""
        missing = self.pool.layout.peak_pages(sequence.num_tokens) - sequence.pages.held
        return PageCount(max(0, missing.local), max(0, missing.global_))

    def _promised(self) -> PageCount:
        """Pages that running sequences will still take for tokens they already have."""
        promised = PageCount(0, 0)
        for sequence in self.running:
            promised += self._missing(sequence)
        return promised

    def _preempt(self, sequence: Sequence) -> None:
        remove_sorted(self.running, sequence, rank_of)
        sequence.num_once_computed = max(sequence.num_once_computed, sequence.num_computed_tokens)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.expected_hit = None
        self.waiting.add(sequence)
        self._blocked = None

    def _release(self, sequence: Sequence) -> None:
        self.sharing.end(sequence)
        sequence.pages.release_all(self.pool)
        sequence.num_computed_tokens = 0

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        del self._by_id[sequence.request_id]
        self.waiting.leave(sequence)
        self._blocked = None


def _expected_hit(sequence: Sequence) -> int:
    return sequence.expected_hit or 0
