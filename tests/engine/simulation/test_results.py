"""Percentiles against sorted lists, and objectives against requests counted by hand."""

from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bezel.engine.simulation.recorder import Recorder
from bezel.engine.simulation.results import Distribution, distribution, results_of
from bezel.engine.simulation.simulator import Simulator
from bezel.engine.simulation.trace import TraceRequest


@given(st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0, 9.0]), st.integers(1, 40)), min_size=1))
def test_percentiles_are_those_of_all_values_in_a_row(pairs: list[tuple[float, int]]) -> None:
    values, counts = array("d", (v for v, _ in pairs)), array("q", (n for _, n in pairs))
    row = sorted(value for value, count in pairs for _ in range(count))

    def smallest_that_covers(percent: int) -> float:
        covered = (v for i, v in enumerate(row, start=1) if 100 * i >= percent * len(row))
        return next(covered)

    found = distribution(values, counts)
    assert found is not None
    assert found.mean == pytest.approx(sum(row) / len(row))
    wanted = [smallest_that_covers(percent) for percent in (50, 90, 99)]
    assert [found.p50, found.p90, found.p99, found.max] == [*wanted, row[-1]]


def test_values_without_counts_count_once() -> None:
    values = array("d", (float(i) for i in range(200, 0, -1)))
    assert distribution(values) == Distribution(100.5, 100.0, 180.0, 198.0, 200.0)
    assert distribution(array("d")) is None


def recorder_of(*requests: tuple[float, float, int]) -> Recorder:
    """Of requests with these times to first and last token, and numbers of tokens; 10 s in all."""
    recorder = Recorder(end_s=10.0, num_rejected=1)
    for ttft_s, e2e_s, num_tokens in requests:
        recorder.requests.ttft_s.append(ttft_s)
        recorder.requests.e2e_s.append(e2e_s)
        recorder.requests.num_output_tokens.append(num_tokens)
    return recorder


def test_goodput_counts_who_met_both_objectives() -> None:
    recorder = recorder_of((1.0, 3.0, 5), (1.0, 3.1, 5), (1.1, 1.1, 1), (0.2, 0.2, 1))

    def good(ttft_s: float | None, itl_s: float | None) -> tuple[float, float]:
        goodput = results_of(recorder, ttft_s, itl_s).goodput
        assert goodput is not None
        return goodput.share, goodput.requests_per_s

    assert good(1.0, 0.5) == (pytest.approx(2 / 5), pytest.approx(0.2))
    assert good(1.0, None) == (pytest.approx(3 / 5), pytest.approx(0.3))
    assert good(None, 0.5) == (pytest.approx(3 / 5), pytest.approx(0.3))
    assert results_of(recorder).goodput is None


def test_nothing_answered_is_no_division_by_zero(simulator: Callable[..., Simulator]) -> None:
    long = TraceRequest(prompt_tokens=10_000, num_output_tokens=1)
    for requests in ([], [long]):
        results = results_of(simulator(requests).run(), 1.0)
        assert (results.num_requests, results.num_answered) == (len(requests), 0)
        assert (results.ttft_s, results.requests_per_s, results.idle_share) == (None, 0.0, 0.0)


def test_pages_in_use_are_those_of_sequences(simulator: Callable[..., Simulator]) -> None:
    # 64 tokens leave the 4 local pages of a window, 24 bytes each, and 2 global ones of 32 bytes;
    # the second step takes one more of each kind.
    request = TraceRequest(prompt_tokens=64, num_output_tokens=2)
    results = results_of(simulator([request], enable_prefix_caching=False).run())
    assert results.peak_used_bytes == 5 * 24 + 3 * 32
    first, second = 4 * 24 + 2 * 32, 5 * 24 + 3 * 32
    mean = (0.074 * first + 0.011 * second) / 0.085
    assert results.mean_used_bytes == pytest.approx(mean)
    assert results.peak_cached_bytes == 0


def test_what_the_cache_keeps_is_kept_while_nothing_runs(
    simulator: Callable[..., Simulator],
) -> None:
    long = TraceRequest(prompt_tokens=10_000, num_output_tokens=1, arrival_s=5.0)
    simulation = simulator([TraceRequest(prompt_tokens=64, num_output_tokens=2), long])
    results = results_of(simulation.run())
    kept = simulation.pool.layout.num_bytes(simulation.pool.idle)
    assert kept > 0
    assert results.timeline["cached_bytes"][-2] == pytest.approx(kept)
    assert kept * (5.0 - 0.085) / 5.0 <= results.mean_cached_bytes < kept
    assert results.timeline["busy"][-2] == 0
    assert results.peak_cached_bytes == kept
