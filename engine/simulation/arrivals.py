"""When requests come: in the order of the trace, or when the one before them has been answered.

The trace is read no further than the clock has come. Of a request that has ended 8 bytes stay.
"""

import heapq
import math
from array import array
from collections.abc import Iterable, Iterator

from bezel.engine.simulation.trace import TraceRequest, trace_error

# A request may come after one that stands so many lines before it.
MAX_DISTANCE = 100_000

_PENDING, _UNANSWERED = math.nan, math.inf


class Arrivals:
    """Hands out each request of a trace once, with its number, when it is due.

    Raises:
        ConfigError: from every method, when a line that has to be read now is wrong.
    """

    def __init__(self, requests: Iterable[TraceRequest]) -> None:
        self._lines = iter(requests)
        self._next_line: TraceRequest | None = None
        self._next_line_s = 0.0
        self._numbers: dict[str, int] = {}  # of the lines that may still be followed
        self._ends = array("d")  # of each request: when it was answered
        self._followers: dict[int, list[tuple[int, TraceRequest]]] = {}
        self._coming: list[tuple[float, int, TraceRequest]] = []
        self.num_skipped = 0  # those that would have followed one which wasn't answered
        self._read_line()

    @property
    def num_read(self) -> int:
        return len(self._ends)

    def next_s(self) -> float | None:
        """When the next request comes; None if none does unless one in hand is answered."""
        while self._next_line and not (self._coming and self._coming[0][0] <= self._next_line_s):
            self._place(self._next_line)
        return self._coming[0][0] if self._coming else None

    def due(self, now_s: float) -> Iterator[tuple[float, int, TraceRequest]]:
        """Arrival time, number and request of each that has come, in the order of time."""
        while self._next_line and self._next_line_s <= now_s:
            self._place(self._next_line)
        while self._coming and self._coming[0][0] <= now_s:
            yield heapq.heappop(self._coming)

    def answered(self, number: int, now_s: float) -> None:
        """Those that follow come when they have thought."""
        self._ends[number] = now_s
        for follower, request in self._followers.pop(number, ()):
            self._let_come(follower, request, now_s)

    def unanswered(self, number: int) -> None:
        """Those that follow never come, nor those that follow them."""
        self._ends[number] = _UNANSWERED
        for follower, _ in self._followers.pop(number, ()):
            self.num_skipped += 1
            self.unanswered(follower)

    def _let_come(self, number: int, request: TraceRequest, end_s: float) -> None:
        arrival_s = max(request.arrival_s or 0.0, end_s + request.think_s)
        heapq.heappush(self._coming, (arrival_s, number, request))

    def _place(self, request: TraceRequest) -> None:
        """Take the line that was read ahead, and read the one after it."""
        number = len(self._ends)
        self._ends.append(_PENDING)
        before = self._number_before(request, number)
        self._name(request, number)
        if before is None:
            heapq.heappush(self._coming, (self._next_line_s, number, request))
        elif math.isnan(self._ends[before]):
            self._followers.setdefault(before, []).append((number, request))
        elif self._ends[before] == _UNANSWERED:
            self.num_skipped += 1
            self.unanswered(number)
        else:
            self._let_come(number, request, self._ends[before])
        self._read_line()

    def _read_line(self) -> None:
        self._next_line = next(self._lines, None)
        if self._next_line is None or self._next_line.arrival_s is None:
            return
        if self._next_line.arrival_s < self._next_line_s:
            problem = f"{self._next_line.arrival_s} is before {self._next_line_s} of a line above"
            raise trace_error(len(self._ends) + 1, f"arrival_s: {problem}")
        self._next_line_s = self._next_line.arrival_s

    def _number_before(self, request: TraceRequest, number: int) -> int | None:
        if request.after is None:
            return None
        before = self._numbers.get(request.after)
        if before is None:
            problem = f"none of the {MAX_DISTANCE:,} lines above has the id {request.after!r}"
            raise trace_error(number + 1, f"after: {problem}")
        return before

    def _name(self, request: TraceRequest, number: int) -> None:
        if request.id is None:
            return
        if request.id in self._numbers:
            line = self._numbers[request.id] + 1
            raise trace_error(number + 1, f"id: line {line} has {request.id!r} as well")
        self._numbers[request.id] = number
        if len(self._numbers) > 2 * MAX_DISTANCE:
            oldest = number - MAX_DISTANCE
            self._numbers = {name: n for name, n in self._numbers.items() if n >= oldest}
