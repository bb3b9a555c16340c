"""A simulation's results for people and for programs, beside the constants they follow from."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bezel.engine.simulation.results import Distribution, Results
from bezel.engine.simulation.setup import Setup

ESTIMATED = "all times are estimated, nothing was run"


def to_json(setup: Setup, results: Results) -> dict[str, Any]:
    """Everything, in plain values: seconds, bytes, and tokens."""
    config = asdict(setup.config)
    return {
        "estimated": ESTIMATED,
        "model": setup.model.name,
        "dtype": setup.model.dtype,
        "device": asdict(setup.device),
        "engine": {name: config[name] for name in config if name not in ("model", "device")},
        "memory": {
            "weight_bytes": setup.model.weight_bytes,
            "kv_bytes": setup.arena_bytes,
            "max_model_len": setup.max_model_len,
        },
        "results": asdict(results),
    }


def to_text(setup: Setup, results: Results) -> str:
    """A page of a terminal."""
    return "\n".join([*_setup_lines(setup), "", *_result_lines(results)])


def _setup_lines(setup: Setup) -> Iterator[str]:
    device, config = setup.device, setup.config
    yield f"{setup.model.name} in {setup.model.dtype} on one {device.name}; {ESTIMATED}"
    yield _line(
        "device",
        f"{device.memory_bytes / 1e9:.0f} GB; {device.bytes_per_s / 1e12:.3g} TB/s, of which "
        f"{device.memory_efficiency:.0%} are reached; {device.flops_per_s / 1e12:.3g} TFLOP/s, "
        f"{device.compute_efficiency:.0%}; {device.step_overhead_s * 1e3:.1f} ms more a step",
    )
    yield _line(
        "memory",
        f"{setup.model.weight_bytes / 1e9:.1f} GB of weights, {setup.arena_bytes / 1e9:.1f} GB of "
        f"KV pages; up to {setup.max_model_len:,} tokens a sequence",
    )
    yield _line(
        "engine",
        f"{config.max_num_seqs} sequences, {config.max_num_batched_tokens:,} tokens a step, "
        f"prefix cache {'on' if config.enable_prefix_caching else 'off'}",
    )


def _result_lines(results: Results) -> Iterator[str]:
    yield _line(
        "requests",
        f"{results.num_requests:,}: {results.num_answered:,} answered, "
        f"{results.num_too_long:,} too long, {results.num_rejected:,} rejected by a full queue, "
        f"{results.num_expired:,} expired, {results.num_skipped:,} after such",
    )
    yield _line(
        "time",
        f"{results.duration_s:,.1f} s, {results.idle_share:.1%} of it idle; "
        f"{results.num_steps:,} steps, {results.num_preemptions:,} preemptions",
    )
    yield ""
    heads = ("mean", "p50", "p90", "p99", "max")
    yield f"{'estimated seconds':<20}" + "".join(f"{head:>10}" for head in heads)
    yield _row("to first token", results.ttft_s)
    yield _row("between tokens", results.itl_s)
    yield _row("end to end", results.e2e_s)
    yield _row("in the queue", results.queue_s)
    yield ""
    yield _line(
        "throughput",
        f"{results.requests_per_s:.2f} requests/s, {results.prompt_tokens_per_s:,.0f} prompt "
        f"tokens/s, {results.output_tokens_per_s:,.0f} output tokens/s",
    )
    yield _line("cache hits", f"{results.hit_rate:.1%} of prompt tokens")
    yield _line(
        "sequences",
        f"{results.mean_running:.1f} running on average, at most {results.peak_running:,}; "
        f"{results.mean_waiting:.1f} waiting, at most {results.peak_waiting:,}",
    )
    yield _line(
        "KV pages",
        f"{results.mean_used_bytes / 1e9:.2f} GB in use on average, at most "
        f"{results.peak_used_bytes / 1e9:.2f}; {results.mean_cached_bytes / 1e9:.2f} GB kept by "
        f"the prefix cache alone, at most {results.peak_cached_bytes / 1e9:.2f}",
    )
    if results.goodput is not None:
        yield _line("goodput", _goodput(results))


def _goodput(results: Results) -> str:
    goodput = results.goodput
    assert goodput is not None
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
