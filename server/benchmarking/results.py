"""The numbers of a run: times, throughput, errors, and what met the objectives."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bezel.engine.simulation.results import Distribution, Goodput, distribution
from bezel.server.benchmarking.measure import Measurement
from bezel.server.benchmarking.settings import ServeBenchmark


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeResults:
    """Times and throughput are of answered requests, and in seconds. `tpot_s` has one value a
    request, its mean time between tokens; `itl_s` one for each gap between chunks. `duration_s` is
    from the start to the end of the last request; goodput's share is of all that ended or were
    skipped after an error. `late_s` is how long requests waited to be sent, with a rate only."""

    num_requests: int
    num_answered: int
    num_skipped: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    duration_s: float
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    late_s: Distribution | None
    requests_per_s: float
    prompt_tokens: int
    output_tokens: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    cached_tokens: int | None
    num_counted_by_chunks: int
    goodput: Goodput | None


def results_of(
    benchmark: ServeBenchmark,
    measurements: Sequence[Measurement],
    num_skipped: int,
    started_s: float,
) -> ServeResults:
    """Sum up what has ended so far."""
    answered = [measured for measured in measurements if measured.error is None]
    failed = [measured for measured in measurements if measured.error is not None]
    duration_s = max((measured.ended_s for measured in measurements), default=started_s) - started_s
    prompt_tokens = sum(measured.prompt_tokens or 0 for measured in answered)
    output_tokens = sum(measured.output_tokens for measured in answered)
    cached = [m.cached_tokens for m in answered if m.cached_tokens is not None]
    has_rate = benchmark.request_rate is not None

    def rate(amount: int) -> float:
        return amount / duration_s if duration_s else 0.0

    goodput = None
    if benchmark.slo_ttft is not None or benchmark.slo_itl is not None:
        num_good = sum(_is_good(measured, benchmark) for measured in answered)
        share = num_good / max(1, len(measurements) + num_skipped)
        goodput = Goodput(benchmark.slo_ttft, benchmark.slo_itl, share, rate(num_good))
    return ServeResults(
        num_requests=len(measurements),
        num_answered=len(answered),
        num_skipped=num_skipped,
        errors=dict(Counter(str(measured.error) for measured in failed).most_common()),
        error_examples={str(measured.error): measured.detail for measured in reversed(failed)},
        duration_s=duration_s,
        ttft_s=_distribution(measured.ttft_s for measured in answered),
        tpot_s=_distribution(measured.tpot_s for measured in answered),
        itl_s=_distribution(gap_s for measured in answered for gap_s in measured.gaps_s),
        e2e_s=_distribution(measured.e2e_s for measured in answered),
        late_s=_distribution(measured.late_s for measured in measurements) if has_rate else None,
        requests_per_s=rate(len(answered)),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prompt_tokens_per_s=rate(prompt_tokens),
        output_tokens_per_s=rate(output_tokens),
        cached_tokens=sum(cached) if cached else None,
        num_counted_by_chunks=sum(not measured.usage for measured in answered),
        goodput=goodput,
    )


def _distribution(values: Iterable[float | None]) -> Distribution | None:
    return distribution(array("d", (value for value in values if value is not None)))


def _is_good(measured: Measurement, benchmark: ServeBenchmark) -> bool:
    if benchmark.slo_ttft is not None and not (
        measured.ttft_s is not None and measured.ttft_s <= benchmark.slo_ttft
    ):
        return False
    return benchmark.slo_itl is None or (measured.tpot_s or 0.0) <= benchmark.slo_itl
