"""The engine's scheduler, pages and prefix cache under a clock that computes how long a step takes.

arrivals → Scheduler.schedule → StepCost.seconds → Scheduler.commit with invented tokens → Recorder

Nothing is computed by a model. What the engine and the server would refuse is refused; JSON,
tokenizing and the network take no time.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import KVLayout
from bezel.engine.messages import FinishReason
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.planning.step_cost import Load
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledStep, Scheduler
from bezel.engine.sequence import Sequence
from bezel.engine.simulation.arrivals import Arrivals
from bezel.engine.simulation.recorder import Recorder
from bezel.engine.simulation.trace import TraceRequest


class StepClock(Protocol):
    """How long a step takes: `StepCost`, or a simpler one in tests."""

    def load(self) -> Load:
        """A step without sequences yet."""

    def seconds(self, load: Load) -> float:
        """What it takes."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A request between its arrival and its end; times in seconds of the trace."""

    number: int
    arrival_s: float
    output_ids: bytes
    sequence: Sequence
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


class Simulator:
    """One engine and one trace; `run` runs it to its end, once.

    `on_end` is called with the number of requests that ended, now and then.
    """

    def __init__(
        self,
        config: EngineConfig,
        layout: KVLayout,
        arena_bytes: int,
        max_model_len: int,
        clock: StepClock,
        requests: Iterable[TraceRequest],
    ) -> None:
        self.pool = PagePool(layout, arena_bytes)
        self.scheduler = Scheduler(config, self.pool, config.prefix_cache_memory_bytes)
        self.recorder = Recorder()
        self._clock = clock
        self._max_model_len = max_model_len
        self._max_in_flight = config.max_num_seqs + config.max_num_queued_reqs
        self._arrivals = Arrivals(requests)
        self._flights: dict[str, _Flight] = {}
        self._unstarted: dict[str, _Flight] = {}
        self._deadlines: list[tuple[float, int]] = []
        self.now_s = 0.0

    def run(self, on_end: Callable[[int], object] = lambda count: None) -> Recorder:
        """Answer every request of the trace.

        Raises:
            ConfigError: a line of the trace is wrong.
        """
        self.now_s = self._arrivals.next_s() or 0.0
        self.recorder.origin_s = self.recorder.end_s = self.now_s
        while True:
            self._take_arrivals()
            self._expire()
            if self.scheduler.has_work:
                on_end(self._step())
            elif (next_s := self._arrivals.next_s()) is not None:
                self.recorder.idle(self.now_s, next_s, self.pool)
                self.now_s = next_s
            else:
                break
        self.recorder.num_skipped = self._arrivals.num_skipped
        return self.recorder

    def _take_arrivals(self) -> None:
        for arrival_s, number, request in self._arrivals.due(self.now_s):
            num_tokens = request.num_prompt_tokens + request.num_output_tokens
            if num_tokens > self._max_model_len:
                self.recorder.num_too_long += 1
                self._arrivals.unanswered(number)
            elif len(self._flights) >= self._max_in_flight:
                self.recorder.num_rejected += 1
                self._arrivals.unanswered(number)
            else:
                self._add(arrival_s, number, request)

    def _add(self, arrival_s: float, number: int, request: TraceRequest) -> None:
        sequence = Sequence(
            request_id=str(number),
            token_ids=request.prompt_ids(number),
            params=SamplingParams(
                max_tokens=request.num_output_tokens,
                priority=request.priority,
                cache_salt=request.cache_salt,
                tenant=request.tenant,
                num_preamble_tokens=request.num_preamble_tokens,
            ),
            seed=0,
            stop_token_ids=frozenset(),
            pages=PageTables(self.pool.layout),
        )
        flight = _Flight(number, arrival_s, request.output_ids(number), sequence)
        self._flights[sequence.request_id] = self._unstarted[sequence.request_id] = flight
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (arrival_s + request.deadline_s, number))
        self.scheduler.add(sequence)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self.now_s:
            _, number = heapq.heappop(self._deadlines)
            if self._flights.pop(str(number), None) is not None:
                self._unstarted.pop(str(number), None)
                self.scheduler.finish(str(number), FinishReason.ABORT)
                self.recorder.num_expired += 1
                self._arrivals.unanswered(number)

    def _step(self) -> int:
        """Compute one step; the number of requests that ended with it."""
        step = self.scheduler.schedule()
        assert step.sequences, "there is work, but nothing could be scheduled"
        start_s, flights = self.now_s, self._flights
        sampled = step.sampled
        self.now_s += self._seconds(step)
        if self._unstarted:
            self._start(step, start_s)
        self.recorder.num_preemptions += step.num_preemptions
        num_decode = sum(not scheduled.is_prefill for scheduled in step.sequences)
        num_prompt = step.num_tokens - num_decode
        self.recorder.step(start_s, self.now_s, self.scheduler, num_prompt, len(sampled))
        token_ids = [flights[s.request_id].output_ids[s.num_output_tokens] for s in sampled]
        self.scheduler.commit(step, token_ids)
        return self._book(sampled, start_s)

    def _seconds(self, step: ScheduledStep) -> float:
        load = self._clock.load()
        for scheduled in step.sequences:
            load.add(scheduled.start, scheduled.end, scheduled.is_sampled)
        return self._clock.seconds(load)

    def _start(self, step: ScheduledStep, start_s: float) -> None:
        for scheduled in step.sequences:
            flight = self._unstarted.pop(scheduled.sequence.request_id, None)
            if flight is not None:
                flight.started_s = start_s

    def _book(self, sampled: list[Sequence], start_s: float) -> int:
        """Book the tokens that came at this moment; return how many requests ended."""
        now_s, num_steady, num_ended = self.now_s, 0, 0
        for sequence in sampled:
            flight = self._flights[sequence.request_id]
            if sequence.num_output_tokens == 1:
                flight.first_token_s = now_s
            elif flight.last_token_s == start_s:
                num_steady += 1
            else:
                self.recorder.gap(now_s - flight.last_token_s, 1)
            flight.last_token_s = now_s
            if sequence.finish_reason is not None:
                self._end(flight)
                num_ended += 1
        if num_steady:
            self.recorder.gap(now_s - start_s, num_steady)
        return num_ended

    def _end(self, flight: _Flight) -> None:
        sequence, requests = flight.sequence, self.recorder.requests
        del self._flights[sequence.request_id]
        requests.arrival_s.append(flight.arrival_s)
        requests.queue_s.append(flight.started_s - flight.arrival_s)
        requests.ttft_s.append(flight.first_token_s - flight.arrival_s)
        requests.e2e_s.append(self.now_s - flight.arrival_s)
        requests.num_prompt_tokens.append(sequence.num_prompt_tokens)
        requests.num_cached_tokens.append(sequence.num_cached_tokens)
        requests.num_output_tokens.append(sequence.num_output_tokens)
        self._arrivals.answered(flight.number, self.now_s)
