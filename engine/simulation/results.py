"""The numbers of a simulation: percentiles, throughput, memory, and what met the objectives."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bezel.engine.simulation.recorder import QUANTITIES, Recorder, Requests
from bezel.engine.simulation.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of measured values. A percentile is the smallest value that as many per cent don't exceed."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that got their first token within `ttft_s`, and those after it within `itl_s` on
    average. `share` is of all requests, `requests_per_s` of all time."""

    ttft_s: float | None
    itl_s: float | None
    share: float
    requests_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Seconds are estimated. `duration_s` is from the first arrival to the end of the last step, or
    to the last arrival.

    Rates are of answered requests. Tokens of prompts count also where the prefix cache had them,
    whose share is `hit_rate`. "Used" are pages that sequences hold, "cached" those that only the
    prefix cache does. `timeline` has means over `bin_s` seconds each, from `origin_s` on, when the
    first request came.
    """

    num_requests: int
    num_answered: int
    num_too_long: int
    num_rejected: int
    num_expired: int
    num_skipped: int
    num_steps: int
    num_preemptions: int
    duration_s: float
    idle_share: float
    ttft_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    queue_s: Distribution | None
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    hit_rate: float
    mean_running: float
    peak_running: int
    mean_waiting: float
    peak_waiting: int
    mean_used_bytes: float
    peak_used_bytes: int
    mean_cached_bytes: float
    peak_cached_bytes: int
    goodput: Goodput | None
    origin_s: float
    bin_s: float
    timeline: Mapping[str, list[float]]


def results_of(
    recorder: Recorder, slo_ttft_s: float | None = None, slo_itl_s: float | None = None
) -> Results:
    """Sum up a simulation that has ended; with an objective, also how many met it."""
    requests, timeline = recorder.requests, recorder.timeline
    duration_s = recorder.end_s - recorder.origin_s
    num_answered = len(requests.ttft_s)
    num_requests = num_answered + recorder.num_unanswered

    def rate(amount: float) -> float:
        return amount / duration_s if duration_s else 0.0

    def mean(*names: str) -> float:
        return rate(sum(timeline.total(name) for name in names))

    goodput = None
    if slo_ttft_s is not None or slo_itl_s is not None:
        num_good = _num_within(requests, slo_ttft_s, slo_itl_s)
        share = num_good / max(1, num_requests)
        goodput = Goodput(slo_ttft_s, slo_itl_s, share, rate(num_good))
    return Results(
        num_requests=num_requests,
        num_answered=num_answered,
        num_too_long=recorder.num_too_long,
        num_rejected=recorder.num_rejected,
        num_expired=recorder.num_expired,
        num_skipped=recorder.num_skipped,
        num_steps=recorder.num_steps,
        num_preemptions=recorder.num_preemptions,
        duration_s=duration_s,
        idle_share=max(0.0, 1 - mean("busy")) if duration_s else 0.0,
        ttft_s=distribution(requests.ttft_s),
        itl_s=distribution(recorder.gaps_s, recorder.gap_counts),
        e2e_s=distribution(requests.e2e_s),
        queue_s=distribution(requests.queue_s),
        requests_per_s=rate(num_answered),
        prompt_tokens_per_s=rate(sum(requests.num_prompt_tokens)),
        output_tokens_per_s=rate(sum(requests.num_output_tokens)),
        hit_rate=sum(requests.num_cached_tokens) / max(1, sum(requests.num_prompt_tokens)),
        mean_running=mean("running"),
        peak_running=recorder.peak_running,
        mean_waiting=mean("waiting"),
        peak_waiting=recorder.peak_waiting,
        mean_used_bytes=mean("local_bytes", "global_bytes"),
        peak_used_bytes=recorder.peak_used_bytes,
        mean_cached_bytes=mean("cached_bytes"),
        peak_cached_bytes=recorder.peak_cached_bytes,
        goodput=goodput,
        origin_s=recorder.origin_s,
        bin_s=timeline.bin_s,
        timeline=_series(timeline, duration_s),
    )


def distribution(values: "array[float]", counts: "array[int] | None" = None) -> Distribution | None:
    """Exact, of each value as often as `counts` says, or once; None if there are none."""
    if not values:
        return None
    values_N = np.asarray(values)
    counts_N = np.ones(len(values), dtype=np.int64) if counts is None else np.asarray(counts)
    order_N = np.argsort(values_N)
    values_N, counts_N = values_N[order_N], counts_N[order_N]
    up_to_N = np.cumsum(counts_N)
    return Distribution(
        float(np.average(values_N, weights=counts_N)),
        *(_percentile(values_N, up_to_N, percent) for percent in (50, 90, 99, 100)),
    )


def _percentile(
    values_N: npt.NDArray[np.float64], up_to_N: npt.NDArray[np.int64], percent: int
) -> float:
    rank = -(-percent * int(up_to_N[-1]) // 100)
    return float(values_N[np.searchsorted(up_to_N, rank)])


def mean_itl_s(requests: Requests) -> npt.NDArray[np.float64]:
    """Of each request the mean time between its tokens; 0 for one with a single token."""
    num_gaps_N = np.asarray(requests.num_output_tokens) - 1
    decode_s_N = np.asarray(requests.e2e_s) - np.asarray(requests.ttft_s)
    means_N: npt.NDArray[np.float64] = decode_s_N / np.maximum(1, num_gaps_N)
    return means_N


def _num_within(requests: Requests, ttft_s: float | None, itl_s: float | None) -> int:
    is_good_N = np.ones(len(requests.ttft_s), dtype=bool)
    if ttft_s is not None:
        is_good_N &= np.asarray(requests.ttft_s) <= ttft_s
    if itl_s is not None:
        is_good_N &= mean_itl_s(requests) <= itl_s
    return int(is_good_N.sum())


def _series(timeline: Timeline, end_s: float) -> dict[str, list[float]]:
    return {name: timeline.means(name, end_s) for name in QUANTITIES}
