"""Who starts next: by priority, fairly between tenants, and nobody waits for ever.

A tenant is whoever shares an API key. Of those with somebody waiting at the lowest `priority`, the
one goes first for which the fewest tokens have been computed; of its own, the first to come. A
tenant that comes back from idleness starts level with the least served of the others: what it left
unused it can't claim later (Sheng et al. 2024, "Fairness in Serving Large Language Models").

Every `OLDEST_TURN`-th place goes, whatever the priorities, to the one that has waited longest: of
the tenant served least, but of all tenants as soon as `LONG_WAIT` others have started meanwhile. If
that puts it before a lower priority it is *due* and outranks all that aren't, so that it keeps the
place.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice, takewhile
from operator import attrgetter
from typing import Any

from bezel.engine.sequence import Sequence

OLDEST_TURN = 8
LONG_WAIT = 64

rank_of = attrgetter("rank")
_arrival_of = attrgetter("arrival")


@dataclass(slots=True)
class _Line:
    """Those of one tenant that wait, in two orders."""

    ranked: list[Sequence] = field(default_factory=list)
    by_arrival: list[Sequence] = field(default_factory=list)


class WaitingQueue:
    """What it does takes longer with more tenants, but not with more sequences that wait."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._num_served: dict[str, int] = {}
        self._num_unfinished: dict[str, int] = {}
        self._num_waiting = 0
        self._num_started = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """By rank, whosever they are."""
        return merge(*(line.ranked for line in self._lines.values()), key=rank_of)

    def arrive(self, sequence: Sequence) -> None:
        """Take in a new one; `leave` has to be called when it has ended."""
        tenant = sequence.params.tenant
        if tenant not in self._num_unfinished:
            levels = [self._num_served[other] for other in self._num_unfinished]
            self._num_served[tenant] = max([self._num_served.get(tenant, 0), *sorted(levels)[:1]])
            self._num_unfinished[tenant] = 0
        self._num_unfinished[tenant] += 1
        sequence.num_started_before = self._num_started
        self.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Forget one that has ended. How much its tenant was served counts until all have ended."""
        tenant = sequence.params.tenant
        self._num_unfinished[tenant] -= 1
        if not self._num_unfinished[tenant]:
            del self._num_unfinished[tenant]
        if not self._num_unfinished:
            self._num_served.clear()

    def add(self, sequence: Sequence) -> None:
        """Have it wait, for the first time or again."""
        line = self._lines.setdefault(sequence.params.tenant, _Line())
        insort(line.ranked, sequence, key=rank_of)
        insort(line.by_arrival, sequence, key=_arrival_of)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        line = self._lines[sequence.params.tenant]
        remove_sorted(line.ranked, sequence, rank_of)
        remove_sorted(line.by_arrival, sequence, _arrival_of)
        if not line.ranked:
            del self._lines[sequence.params.tenant]
        self._num_waiting -= 1

    def first(self, num: int) -> list[Sequence]:
        """The next to start; after it, of `num` in all, those who may go before it because they
        come from the same tenant with the same priority. Empty if nobody waits."""
        if not self._lines:
            return []
        line = self._next_line()
        level = line.ranked[0].rank[:2]
        if self._num_started % OLDEST_TURN == OLDEST_TURN - 1:
            oldest = min((line.by_arrival[0] for line in self._lines.values()), key=_arrival_of)
            if self._num_started - oldest.num_started_before >= LONG_WAIT:
                return [oldest]
            oldest = min(self._lines.values(), key=self._age_of).by_arrival[0]
            if oldest.rank[:2] > level:
                return [oldest]
        return list(takewhile(lambda s: s.rank[:2] == level, islice(line.ranked, num)))

    def start(self, sequence: Sequence) -> None:
        """Book that one has got its place."""
        level = self._next_line().ranked[0].rank[:2]
        self.remove(sequence)
        sequence.is_due = sequence.is_due or sequence.rank[:2] > level
        self._num_started += 1

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Book tokens that are computed for its tenant."""
        self._num_served[sequence.params.tenant] += num_tokens

    def _next_line(self) -> _Line:
        return min(self._lines.values(), key=self._rank_of_line)

    def _rank_of_line(self, line: _Line) -> tuple[Any, ...]:
        head = line.ranked[0]
        return *head.rank[:2], self._num_served[head.params.tenant], head.arrival

    def _age_of(self, line: _Line) -> tuple[int, int]:
        head = line.by_arrival[0]
        return self._num_served[head.params.tenant], head.arrival


def remove_sorted(
    queue: list[Sequence], sequence: Sequence, key: Callable[[Sequence], Any]
) -> None:
    """Take it out of a queue in the order of `key`, without looking through all of it."""
    del queue[bisect_left(queue, key(sequence), key=key)]
