"""Simulations small enough to compute by hand, and random ones in which nothing may get lost."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bezel.engine.planning.device import PRESETS
from bezel.engine.planning.model import PlannedModel
from bezel.engine.planning.source import resolve_config
from bezel.engine.planning.step_cost import Load, StepCost
from bezel.engine.simulation.recorder import Recorder
from bezel.engine.simulation.results import results_of
from bezel.engine.simulation.simulator import Simulator
from bezel.engine.simulation.trace import TraceRequest

Make = Callable[..., Simulator]


def ask(num_prompt: int, num_output: int, arrival_s: float = 0.0, **fields: Any) -> TraceRequest:
    return TraceRequest(
        prompt_tokens=num_prompt, num_output_tokens=num_output, arrival_s=arrival_s, **fields
    )


def test_one_request_takes_its_steps(simulator: Make) -> None:
    recorder = simulator([ask(40, 3, 7.0)]).run()
    requests = recorder.requests
    assert requests.queue_s.tolist() == [0.0]
    assert requests.ttft_s.tolist() == [pytest.approx(0.050)]
    assert requests.e2e_s.tolist() == [pytest.approx(0.050 + 2 * 0.011)]
    assert recorder.gaps_s.tolist() == pytest.approx([0.011, 0.011])
    assert (recorder.num_steps, recorder.end_s) == (3, pytest.approx(7.072))


def test_a_chunked_prompt_has_its_first_token_after_the_last_chunk(simulator: Make) -> None:
    recorder = simulator([ask(150, 1)]).run()
    assert recorder.requests.ttft_s.tolist() == [pytest.approx(0.074 + 0.074 + 0.032)]


def test_time_to_first_token_is_what_the_planner_says_of_the_prompt(simulator: Make) -> None:
    cost = StepCost(PlannedModel.of(*resolve_config("gemma-3-270m")), PRESETS["h100"])
    load = cost.load()
    load.add(0, 50, True)
    recorder = simulator([ask(50, 1)], clock=cost).run()
    assert recorder.requests.ttft_s.tolist() == [pytest.approx(cost.seconds(load))]


def test_who_comes_during_a_step_waits_for_its_end(simulator: Make) -> None:
    recorder = simulator([ask(40, 3), ask(30, 1, 0.005)]).run()
    requests = recorder.requests
    assert requests.num_prompt_tokens.tolist() == [30, 40], "in the order of their ends"
    assert requests.queue_s.tolist() == [pytest.approx(0.045), 0.0]
    both = 0.010 + 0.001 * (1 + 30)
    assert requests.ttft_s.tolist() == pytest.approx([0.045 + both, 0.050])
    assert requests.e2e_s.tolist() == pytest.approx([0.045 + both, 0.050 + both + 0.011])
    assert recorder.gaps_s.tolist() == pytest.approx([both, 0.011])
    assert (recorder.peak_running, recorder.peak_waiting) == (2, 0)


def test_the_clock_jumps_over_gaps_and_knows_them_as_idle(simulator: Make) -> None:
    recorder = simulator([ask(40, 1, 5.0), ask(40, 1, 6.0)]).run()
    assert recorder.requests.ttft_s.tolist() == pytest.approx([0.050, 0.050])
    results = results_of(recorder)
    assert results.duration_s == pytest.approx(1.050)
    assert results.idle_share == pytest.approx(0.950 / 1.050)
    assert results.requests_per_s == pytest.approx(2 / 1.050)
    assert results.mean_running == pytest.approx(0.100 / 1.050)


def test_the_next_turn_waits_thinks_and_finds_what_was_said(simulator: Make) -> None:
    said: list[tuple[str, int]] = [("hello", 70)]
    first = TraceRequest(id="a", prompt=said, num_output_tokens=60)
    more = [*said, ("output:a", 60), ("why", 10)]
    second = TraceRequest(after="a", think_s=3.0, prompt=more, num_output_tokens=1)
    other = [*said, ("output:b", 60), ("why", 10)]
    third = TraceRequest(arrival_s=60.0, prompt=other, num_output_tokens=1)
    recorder = simulator([first, second, third], max_num_batched_tokens=256).run()
    requests = recorder.requests
    first_end = 0.080 + 59 * 0.011
    assert requests.arrival_s.tolist() == pytest.approx([0.0, first_end + 3.0, 60.0])
    assert requests.num_cached_tokens.tolist() == [0, 128, 64], "whole pages of 32 tokens"
    assert requests.ttft_s[1] == pytest.approx(0.010 + 0.001 * (140 - 128))
    assert results_of(recorder).hit_rate == pytest.approx((128 + 64) / (70 + 140 + 140))


def test_a_full_queue_rejects_and_nobody_follows_who_was_not_answered(simulator: Make) -> None:
    requests = [
        ask(40, 2, id="a"),
        ask(40, 2, id="b"),
        ask(40, 2, id="c"),
        ask(40, 2, id="d", after="c"),
        ask(40, 2, after="d"),
        ask(40, 2, after="b"),
        ask(390, 20, id="long"),
        ask(40, 2, after="long"),
    ]
    recorder = simulator(requests, max_num_seqs=1, max_num_queued_reqs=1).run()
    assert len(recorder.requests.ttft_s) == 3
    assert (recorder.num_rejected, recorder.num_too_long, recorder.num_skipped) == (1, 1, 3)


def test_a_deadline_ends_a_request_wherever_it_is(simulator: Make) -> None:
    requests = [
        ask(40, 100, deadline_s=0.2, id="runs"),
        ask(40, 5, after="runs"),
        ask(40, 5, deadline_s=0.1),
        ask(40, 1, deadline_s=5.0),
    ]
    simulation = simulator(requests, max_num_seqs=1)
    recorder = simulation.run()
    assert (recorder.num_expired, recorder.num_skipped) == (2, 1)
    [queue_s] = recorder.requests.queue_s
    assert 0.2 <= queue_s < 0.2 + 0.011
    assert not simulation.scheduler.has_work


def test_priority_goes_first(simulator: Make) -> None:
    requests = [ask(40, 5), ask(41, 1, priority=1), ask(42, 1, priority=0)]
    recorder = simulator(requests, max_num_seqs=1).run()
    assert recorder.requests.num_prompt_tokens.tolist() == [40, 42, 41]


def test_salts_and_the_switch_keep_beginnings_apart(simulator: Make) -> None:
    def hits(*salts: str, **flags: bool) -> list[int]:
        text = [("same", 100)]
        requests = [
            TraceRequest(arrival_s=i, prompt=text, num_output_tokens=1, cache_salt=salt)
            for i, salt in enumerate(salts)
        ]
        return simulator(requests, **flags).run().requests.num_cached_tokens.tolist()

    assert hits("a", "b", "a") == [0, 0, 96]
    assert hits("a", "a", enable_prefix_caching=False) == [0, 0]


def check_gaps(recorder: Recorder) -> None:
    """Of requests that were all answered: each token but the first has its gap."""
    rows = recorder.requests
    assert sum(recorder.gap_counts) == sum(n - 1 for n in rows.num_output_tokens)
    total_s = sum(s * n for s, n in zip(recorder.gaps_s, recorder.gap_counts, strict=True))
    assert total_s == pytest.approx(sum(rows.e2e_s) - sum(rows.ttft_s))


class Steps:
    """A clock whose steps take random times, and which remembers them."""

    def __init__(self, seconds: list[float]) -> None:
        self.choices = seconds
        self.total_s = 0.0
        self.num_steps = 0

    def load(self) -> Load:
        return Load(32)

    def seconds(self, load: Load) -> float:
        assert load.num_tokens > 0
        self.num_steps += 1
        seconds = self.choices[self.num_steps % len(self.choices)]
        self.total_s += seconds
        return seconds


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRequest]:
    now, requests = 0.0, []
    for i in range(draw(st.integers(1, 14))):
        now += draw(st.sampled_from([0.0, 0.0, 0.03, 4.0]))
        after = draw(st.none() | st.sampled_from([f"r{j}" for j in range(i)])) if i else None
        texts = [("shared", draw(st.integers(1, 150))), (f"own {i}", draw(st.integers(1, 150)))]
        requests.append(
            TraceRequest(
                id=f"r{i}",
                arrival_s=now,
                after=after,
                think_s=draw(st.sampled_from([0.0, 0.5])),
                prompt=texts,
                num_output_tokens=draw(st.integers(1, 60)),
                priority=draw(st.integers(0, 1)),
                tenant=draw(st.sampled_from("xy")),
                deadline_s=draw(st.sampled_from([None, None, None, 0.5])),
            )
        )
    return requests


@given(
    requests=traces(),
    seconds=st.lists(st.floats(0.001, 0.1), min_size=1, max_size=5),
    num_sectors=st.integers(6, 30),
    queue=st.sampled_from([0, 2, 20]),
)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_and_time_goes_on(
    simulator: Make,
    requests: list[TraceRequest],
    seconds: list[float],
    num_sectors: int,
    queue: int,
) -> None:
    clock = Steps(seconds)
    flags = {"num_sectors": num_sectors, "max_model_len": 256, "max_num_queued_reqs": queue}
    simulation = simulator(requests, clock, **flags)
    recorder = simulation.run()
    assert len(recorder.requests.ttft_s) + recorder.num_unanswered == len(requests)
    assert not simulation.scheduler.has_work
    assert simulation.pool.used == simulation.pool.idle
    simulation.pool.check_integrity()

    assert recorder.num_steps == clock.num_steps
    assert recorder.timeline.total("busy") == pytest.approx(clock.total_s)
    assert recorder.end_s - recorder.origin_s >= clock.total_s * (1 - 1e-9)
    rows = recorder.requests
    for queue_s, ttft_s, e2e_s in zip(rows.queue_s, rows.ttft_s, rows.e2e_s, strict=True):
        assert 0 <= queue_s < ttft_s <= e2e_s
    if recorder.num_expired == 0:
        check_gaps(recorder)
    again = simulator(requests, Steps(seconds), **flags).run()
    assert results_of(again) == results_of(recorder), "the same trace, the same result"


def test_preempted_sequences_wait_longer_for_a_token(simulator: Make) -> None:
    recorder: Recorder = simulator([ask(60, 150), ask(60, 150)], num_sectors=7).run()
    assert recorder.num_preemptions > 0
    assert len(recorder.requests.ttft_s) == 2
    check_gaps(recorder)
    assert max(recorder.gaps_s) > 0.3, "until the other has ended"
