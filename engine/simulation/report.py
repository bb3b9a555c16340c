"""A simulation's results for people and for programs, beside the constants they follow from."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bezel.engine.simulation.results import Results
from bezel.engine.simulation.setup import Setup
from bezel.engine.simulation.text import goodput_text, line, table

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
    yield line(
        "device",
        f"{device.memory_bytes / 1e9:.0f} GB; {device.bytes_per_s / 1e12:.3g} TB/s, of which "
        f"{device.memory_efficiency:.0%} are reached; {device.flops_per_s / 1e12:.3g} TFLOP/s, "
        f"{device.compute_efficiency:.0%}; {device.step_overhead_s * 1e3:.1f} ms more a step",
    )
    yield line(
        "memory",
        f"{setup.model.weight_bytes / 1e9:.1f} GB of weights, {setup.arena_bytes / 1e9:.1f} GB of "
        f"KV pages; up to {setup.max_model_len:,} tokens a sequence",
    )
    yield line(
        "engine",
        f"{config.max_num_seqs} sequences, {config.max_num_batched_tokens:,} tokens a step, "
        f"prefix cache {'on' if config.enable_prefix_caching else 'off'}",
    )


def _result_lines(results: Results) -> Iterator[str]:
    yield line(
        "requests",
        f"{results.num_requests:,}: {results.num_answered:,} answered, "
        f"{results.num_too_long:,} too long, {results.num_rejected:,} rejected by a full queue, "
        f"{results.num_expired:,} expired, {results.num_skipped:,} after such",
    )
    yield line(
        "time",
        f"{results.duration_s:,.1f} s, {results.idle_share:.1%} of it idle; "
        f"{results.num_steps:,} steps, {results.num_preemptions:,} preemptions",
    )
    yield ""
    yield from table(
        "estimated seconds",
        [
            ("to first token", results.ttft_s),
            ("between tokens", results.itl_s),
            ("end to end", results.e2e_s),
            ("in the queue", results.queue_s),
        ],
    )
    yield ""
    yield line(
        "throughput",
        f"{results.requests_per_s:.2f} requests/s, {results.prompt_tokens_per_s:,.0f} prompt "
        f"tokens/s, {results.output_tokens_per_s:,.0f} output tokens/s",
    )
    yield line("cache hits", f"{results.hit_rate:.1%} of prompt tokens")
    yield line(
        "sequences",
        f"{results.mean_running:.1f} running on average, at most {results.peak_running:,}; "
        f"{results.mean_waiting:.1f} waiting, at most {results.peak_waiting:,}",
    )
    yield line(
        "KV pages",
        f"{results.mean_used_bytes / 1e9:.2f} GB in use on average, at most "
        f"{results.peak_used_bytes / 1e9:.2f}; {results.mean_cached_bytes / 1e9:.2f} GB kept by "
        f"the prefix cache alone, at most {results.peak_cached_bytes / 1e9:.2f}",
    )
    if results.goodput is not None:
        yield line("goodput", goodput_text(results.goodput))
