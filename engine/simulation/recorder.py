"""What a simulation remembers of requests and steps: numbers in arrays, and sums over time.

A request leaves 56 bytes; a step 16, for the gap between two tokens that all who decoded share.
"""

from array import array
from dataclasses import dataclass, field

from bezel.engine.page_pool import PagePool
from bezel.engine.scheduler import Scheduler
from bezel.engine.simulation.timeline import Timeline

QUANTITIES = (
    "running",
    "waiting",
    "local_bytes",
    "global_bytes",
    "cached_bytes",
    "prompt_tokens_per_s",
    "output_tokens_per_s",
    "busy",
)


def _floats() -> "array[float]":
    return array("d")


def _ints() -> "array[int]":
    return array("q")


@dataclass(slots=True)
class Requests:
    """Of all that were answered, in the order of their ends. `queue_s` is the time until the first
    step that computed some of it."""

    arrival_s: "array[float]" = field(default_factory=_floats)
    queue_s: "array[float]" = field(default_factory=_floats)
    ttft_s: "array[float]" = field(default_factory=_floats)
    e2e_s: "array[float]" = field(default_factory=_floats)
    num_prompt_tokens: "array[int]" = field(default_factory=_ints)
    num_cached_tokens: "array[int]" = field(default_factory=_ints)
    num_output_tokens: "array[int]" = field(default_factory=_ints)


@dataclass(slots=True)
class Recorder:
    """Filled by the simulator. Every request read is counted once: answered, or why it wasn't."""

    requests: Requests = field(default_factory=Requests)
    num_too_long: int = 0
    num_rejected: int = 0
    num_expired: int = 0
    num_skipped: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    # Gaps between two tokens of a sequence, and how many sequences had each.
    gaps_s: "array[float]" = field(default_factory=_floats)
    gap_counts: "array[int]" = field(default_factory=_ints)
    timeline: Timeline = field(default_factory=lambda: Timeline(QUANTITIES))
    peak_running: int = 0
    peak_waiting: int = 0
    peak_used_bytes: int = 0
    peak_cached_bytes: int = 0
    origin_s: float = 0.0
    end_s: float = 0.0

    @property
    def num_unanswered(self) -> int:
        return self.num_too_long + self.num_rejected + self.num_expired + self.num_skipped

    def gap(self, seconds: float, count: int) -> None:
        """`count` sequences got a token so long after the one before."""
        self.gaps_s.append(seconds)
        self.gap_counts.append(count)

    def step(
        self,
        start_s: float,
        end_s: float,
        scheduler: Scheduler,
        num_prompt_tokens: int,
        num_output_tokens: int,
    ) -> None:
        """A step from `start_s` to `end_s`, the scheduler as it is while it's being computed."""
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        bytes_used = _bytes_used(scheduler.pool)
        local_bytes, global_bytes, cached_bytes = bytes_used
        self.num_steps += 1
        self.peak_running = max(self.peak_running, running)
        self.peak_waiting = max(self.peak_waiting, waiting)
        self.peak_used_bytes = max(self.peak_used_bytes, local_bytes + global_bytes)
        self.peak_cached_bytes = max(self.peak_cached_bytes, cached_bytes)
        self.end_s = end_s
        seconds = end_s - start_s
        self.timeline.add(
            start_s - self.origin_s,
            end_s - self.origin_s,
            (
                running,
                waiting,
                *bytes_used,
                num_prompt_tokens / seconds,
                num_output_tokens / seconds,
                1.0,
            ),
        )

    def idle(self, start_s: float, end_s: float, pool: PagePool) -> None:
        """Nothing to do from `start_s` to `end_s`; the prefix cache keeps its pages."""
        self.end_s = end_s
        bytes_used = _bytes_used(pool)
        self.peak_cached_bytes = max(self.peak_cached_bytes, bytes_used[-1])
        values = (0, 0, *bytes_used, 0.0, 0.0, 0.0)
        self.timeline.add(start_s - self.origin_s, end_s - self.origin_s, values)


def _bytes_used(pool: PagePool) -> tuple[int, int, int]:
    """Of local and global pages that sequences hold, and of all that only the cache holds."""
    layout, idle = pool.layout, pool.idle
    used = pool.used - idle
    return (
        used.local * layout.local_page_bytes,
        used.global_ * layout.global_page_bytes,
        layout.num_bytes(idle),
    )
