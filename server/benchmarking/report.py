"""A run's results for people and for programs."""

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bezel.engine.simulation.results import Distribution, Goodput
from bezel.server.benchmarking.load import ServeRun
from bezel.server.benchmarking.measure import Measurement
from bezel.server.benchmarking.results import ServeResults
from bezel.server.version import VERSION

# Requests that begin later than this were held back by the client, and the rate wasn't the wanted.
_LATE_S = 0.01


def to_json(run: ServeRun, results: ServeResults) -> dict[str, Any]:
    """Everything, in plain values, with a row for each request; the API key is left out."""
    arguments = asdict(run.benchmark)
    del arguments["api_key"]
    return {
        "benchmark": "serve",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "client": {"bezel": VERSION, "python": platform.python_version()},
        "server": {"model": run.model, "version": run.version},
        "arguments": arguments,
        "results": asdict(results),
        "requests": [_row_of(measured, run.load.started_s) for measured in run.load.measurements],
    }


def _row_of(measured: Measurement, started_s: float) -> dict[str, Any]:
    return {
        "sent_s": measured.sent_s - started_s,
        "late_s": measured.late_s,
        "ttft_s": measured.ttft_s,
        "tpot_s": measured.tpot_s,
        "e2e_s": measured.e2e_s,
        "prompt_tokens": measured.prompt_tokens,
        "output_tokens": measured.output_tokens,
        "error": measured.error,
    }


def to_text(run: ServeRun, results: ServeResults) -> str:
    """Less than a page of a terminal."""
    return "\n".join(_lines(run, results))


def _lines(run: ServeRun, results: ServeResults) -> Iterator[str]:
    benchmark = run.benchmark
    pace = f", {benchmark.request_rate:g} begin a second" if benchmark.request_rate else ""
    yield f"{run.model} at {benchmark.root_url}, {benchmark.endpoint}"
    yield _line("workload", f"{benchmark.workload}, {benchmark.max_concurrency} at once{pace}")
    total = benchmark.num_prompts
    skipped = f", {results.num_skipped:,} skipped after errors" if results.num_skipped else ""
    yield (
        _line(
            "requests",
            f"{results.num_answered:,} of {total:,} answered in {results.duration_s:,.1f} s",
        )
        + skipped
    )
    missing = total - results.num_requests - results.num_skipped
    if missing:
        yield _line("interrupted", f"{missing:,} requests had not ended")
    for kind, num in results.errors.items():
        yield _line("error", f"{num:,} × {kind} {results.error_examples[kind]}"[:160].strip())
    yield ""
    heads = ("mean", "p50", "p90", "p99", "max")
    yield f"{'seconds':<20}" + "".join(f"{head:>10}" for head in heads)
    yield _row("to first token", results.ttft_s)
    yield _row("between tokens", results.tpot_s)
    yield _row("between chunks", results.itl_s)
    yield _row("end to end", results.e2e_s)
    yield ""
    yield _line(
        "throughput",
        f"{results.requests_per_s:.2f} requests/s, {results.prompt_tokens_per_s:,.0f} prompt "
        f"tokens/s, {results.output_tokens_per_s:,.1f} output tokens/s",
    )
    yield _line("tokens", _tokens(results))
    if results.goodput is not None:
        yield _line("goodput", _goodput(results.goodput))
    if results.late_s is not None and results.late_s.p99 > _LATE_S:
        yield _line(
            "late",
            f"--max-concurrency held requests back, for {results.late_s.mean:.2f} s on average",
        )


def _tokens(results: ServeResults) -> str:
    text = f"{results.prompt_tokens:,} of prompts, {results.output_tokens:,} of answers"
    if results.cached_tokens is not None and results.prompt_tokens:
        text += f"; {results.cached_tokens / results.prompt_tokens:.1%} of prompts from a cache"
    if results.num_counted_by_chunks:
        text += f"; no usage in {results.num_counted_by_chunks:,} answers, chunks counted there"
    return text


def _goodput(goodput: Goodput) -> str:
    limits = []
    if goodput.ttft_s is not None:
        limits.append(f"first token within {goodput.ttft_s:g} s")
    if goodput.itl_s is not None:
        limits.append(f"others every {goodput.itl_s:g} s or faster")
    wanted = " and ".join(limits)
    return f"{goodput.requests_per_s:.2f} requests/s, {goodput.share:.1%} of all: {wanted}"


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def _row(name: str, of: Distribution | None) -> str:
    if of is None:
        return f"{name:<20}" + f"{'-':>10}" * 5
    return f"{name:<20}" + "".join(
        f"{value:>10.4g}" for value in (of.mean, of.p50, of.p90, of.p99, of.max)
    )
