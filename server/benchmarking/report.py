"""A run's results for people and for programs."""

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bezel.engine.simulation.text import goodput_text, line, table
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
    yield line("workload", f"{benchmark.workload}, {benchmark.max_concurrency} at once{pace}")
    total = benchmark.num_prompts
    skipped = f", {results.num_skipped:,} skipped after errors" if results.num_skipped else ""
    yield (
        line(
            "requests",
            f"{results.num_answered:,} of {total:,} answered in {results.duration_s:,.1f} s",
        )
        + skipped
    )
    missing = total - results.num_requests - results.num_skipped
    if missing:
        yield line("interrupted", f"{missing:,} requests had not ended")
    for kind, num in results.errors.items():
        yield line("error", f"{num:,} × {kind} {results.error_examples[kind]}"[:160].strip())
    yield ""
    yield from table(
        "seconds",
        [
            ("to first token", results.ttft_s),
            ("between tokens", results.tpot_s),
            ("between chunks", results.itl_s),
            ("end to end", results.e2e_s),
        ],
    )
    yield ""
    yield line(
        "throughput",
        f"{results.requests_per_s:.2f} requests/s, {results.prompt_tokens_per_s:,.0f} prompt "
        f"tokens/s, {results.output_tokens_per_s:,.1f} output tokens/s",
    )
    yield line("tokens", _tokens(results))
    if results.goodput is not None:
        yield line("goodput", goodput_text(results.goodput))
    if results.late_s is not None and results.late_s.p99 > _LATE_S:
        yield line(
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
