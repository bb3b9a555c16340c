"""Where the time of a decode step goes: `python benchmarks/profile_steps.py [FORMAT]`.

One sequence, and 32 at once. Time is each function's own, by `cProfile`, put into groups by the
module that it is in, compiled kernels too; what belongs to torch or Python counts where it is
called from. The output head, which uses the same products as the layers, is timed apart, and so are
the launches of a recorded step: one by one, less what it takes to start the threads for nothing.
That is done once in a step instead of for each launch, and counts as the rest. The profiler makes
calls of Python look slower than they are; the time of a step without it stands beside.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from decoding import FORMATS, Decoding, build_engine

from bezel.kernels.cpu.program import Program

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1, 32)
CONTEXT, WARM_UP_STEPS = 64, 8
NUM_STEPS = {1: 96, 32: 48}
HEAD, REST = "output head", "rest"
# The first that a module's path contains decides.
GROUPS = {
    "embedding": ("embedding", "packed_rows"),
    "attention": ("attention", "qkv", "rotary", "kv_pages", "kv_cache", "decode_combine"),
    "norms and gelu": ("norm", "gelu"),
    "sampling": ("sampl", "gumbel", "candidates", "nucleus", "draw", "logits", "logprobs", "masks"),
    "products": ("linear", "gemm.", "packed", "cpu/tiles", "moe_mlp"),
    "scheduler and batch": (
        *("scheduler", "batch", "page_pool", "page_tables", "prefix_", "sequence"),
        *("waiting_queue", "messages", "core"),
    ),
}
# Launches of recorded steps, by the beginnings of their names.
LAUNCHES = {
    "embedding": ("unpack",),
    "attention": ("qkv", "rotary", "plan_attention", "attend", "join_attention"),
    "norms and gelu": ("norm", "add_norm", "gelu"),
    "experts": ("route", "dispatch", "gather", "scatter", "multiply_experts", "combine"),
    "products": ("quantize", "multiply"),
}
_NUM_STARTS = 25
_MOST_CALLERS = 8  # how far up to look for a module of ours

Function = tuple[str, int, str]  # file, line, name, as in pstats
Stats = Mapping[Function, tuple[int, int, float, float, Mapping[Function, Any]]]


def group_of(function: Function, root: Path = ROOT) -> str | None:
    """The group of a function of ours, or of torch's product; None for any other."""
    file, _, name = function
    if "torch._C._nn.linear" in name:
        return "products"
    path = Path(file)
    if not path.is_relative_to(root) or path.relative_to(root).parts[0] not in (
        "engine",
        "kernels",
    ):
        return None
    module = path.relative_to(root).as_posix()
    if "embed" in name:  # beside products in one module, as both read packed weights
        return "embedding"
    for group, parts in GROUPS.items():
        if any(part in module for part in parts):
            return group
    return REST


def own_seconds(stats: Stats, root: Path = ROOT) -> dict[str, float]:
    """Seconds by group; together they are all that was profiled."""
    seconds = dict.fromkeys((*GROUPS, REST), 0.0)
    for function, (_, _, own_s, _, _) in stats.items():
        for group, share in _shares(function, stats, root, ()).items():
            seconds[group] += own_s * share
    return seconds


def _shares(
    function: Function, stats: Stats, root: Path, seen: tuple[Function, ...]
) -> dict[str, float]:
    """Groups to which a function's own time belongs: its module's, or those of its callers."""
    group = group_of(function, root)
    if group is not None:
        return {group: 1.0}
    callers = stats[function][4] if function in stats else {}
    callers = {caller: edge for caller, edge in callers.items() if caller not in seen}
    weights = {caller: edge[2] for caller, edge in callers.items()}
    total = sum(weights.values())
    if total <= 0 or len(seen) == _MOST_CALLERS:
        return {REST: 1.0}
    shares: dict[str, float] = {}
    for caller, weight in weights.items():
        for name, share in _shares(caller, stats, root, (*seen, function)).items():
            shares[name] = shares.get(name, 0.0) + share * weight / total
    return shares


def group_of_launch(name: str) -> str:
    """The group of a recorded launch."""
    return next(
        (group for group, names in LAUNCHES.items() if name.startswith(names)),
        REST,
    )


class _Clocks:
    """Stand in for `compute_logits` of a model and for `run` of recorded steps: time what they do,
    unseen by the profiler."""

    def __init__(self, profile: cProfile.Profile, compute_logits: Any) -> None:
        self.seconds: Counter[str] = Counter()
        self._profile, self._compute_logits = profile, compute_logits
        self._run = Program.run

    def head(self, *arguments: Any) -> Any:
        self._profile.disable()
        started = time.perf_counter()
        logits_NV = self._compute_logits(*arguments)
        self.seconds[HEAD] += time.perf_counter() - started
        self._profile.enable()
        return logits_NV

    def run(self, program: Program) -> None:
        self._profile.disable()
        start_s = statistics.median(self._seconds_of(program, 0, 0) for _ in range(_NUM_STARTS))
        for i, name in enumerate(program.names):
            seconds = self._seconds_of(program, i, i + 1) - start_s
            self.seconds[group_of_launch(name)] += max(0.0, seconds)
        self.seconds[REST] += start_s
        self._profile.enable()

    def _seconds_of(self, program: Program, first: int, last: int) -> float:
        started = time.perf_counter()
        self._run(program, first, last)
        return time.perf_counter() - started


def profile(batch: Decoding, num_steps: int) -> tuple[dict[str, float], Stats]:
    """Milliseconds a step by group, and what `pstats` makes of it."""
    profiler = cProfile.Profile()
    model: Any = batch.engine.runner.model
    clocks = _Clocks(profiler, model.compute_logits)
    with (
        patch.object(model, "compute_logits", clocks.head),
        patch.object(Program, "run", lambda program: clocks.run(program)),
    ):
        profiler.enable()
        batch.steps_s(num_steps)
        profiler.disable()
    stats: Stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    seconds = Counter(own_seconds(stats)) + clocks.seconds
    milliseconds = {group: 1e3 * s / num_steps for group, s in seconds.items()}
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1])), stats


def slowest(stats: Stats, num: int, num_steps: int) -> Iterable[str]:
    """Lines of the functions with the most time of their own."""
    by_time = sorted(stats.items(), key=lambda item: -item[1][2])
    for (file, line, name), (_, num_calls, own_s, _, _) in by_time[:num]:
        place = f"{Path(file).name}:{line} " if line else ""
        calls = num_calls / num_steps
        yield f"    {1e3 * own_s / num_steps:8.3f} ms  {calls:7.1f} calls  {place}{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("format", nargs="?", default="default", choices=FORMATS)
    parser.add_argument("--model", default="default")
    parser.add_argument("--functions", type=int, default=0, help="so many slowest ones as well")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    batch = Decoding(build_engine(arguments.format, arguments.model))
    found = {}
    for num_running in SIZES:
        num_steps = NUM_STEPS[num_running]
        batch.fill(num_running, CONTEXT)
        batch.steps_s(WARM_UP_STEPS)
        plain_ms = 1e3 * statistics.median(batch.steps_s(num_steps))
        groups, stats = profile(batch, num_steps)
        batch.empty()
        found[num_running] = {"step_ms": plain_ms, "profiled_ms": groups}
        if arguments.json:
            continue
        total = sum(groups.values())
        print(f"{num_running} at once: {plain_ms:.2f} ms a step, {total:.2f} ms when profiled")
        for group, milliseconds in groups.items():
            print(f"  {group:20} {milliseconds:8.3f} ms  {milliseconds / total:6.1%}")
        print(*slowest(stats, arguments.functions, num_steps), sep="\n")
    if arguments.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
