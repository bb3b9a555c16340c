"""Times every kernel on shapes of Gemma's models, on a GPU: `python benchmarks/kernels.py`.

Median of 25 runs after five, the L2 cache overwritten before each, beside the same in torch. A
kernel whose result differs from the reference's gets no time. `--quick` takes one size of each,
`--json FILE` keeps everything. Bytes and FLOPs: see kernel_cases.py.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from aot.launches import CONFIGS
from attention_cases import attention_cases
from expert_cases import expert_cases
from kernel_cases import Case, Stock, Work, row_cases

from bezel.engine.model_config import ModelConfig

NUM_RUNS, NUM_WARM_RUNS = 25, 5
MIN_BASELINE_RUNS, BASELINE_SECONDS = 3, 0.5
MAX_SECONDS = 420.0
TOLERANCE = 2e-2  # of a row's size: a few roundings to bfloat16
ARENA_SHARE = 0.6  # of free memory
SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host gets ahead of the GPU
QUICK = {"context": 8192, "batch": 8, "tokens": 64}


class Peaks(NamedTuple):
    """Of memory in GB/s, and of dense bfloat16 products with float32 sums in TFLOP/s."""

    bandwidth: float
    flops: float


# From NVIDIA's data sheets, by the name that its driver gives the device.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peaks(1555, 312),
    "NVIDIA A100-SXM4-80GB": Peaks(2039, 312),
    "NVIDIA A100-PCIE-40GB": Peaks(1555, 312),
    "NVIDIA A100 80GB PCIe": Peaks(1935, 312),
    "NVIDIA L4": Peaks(300, 121),
    "NVIDIA GeForce RTX 4090": Peaks(1008, 165),
    "NVIDIA H100 80GB HBM3": Peaks(3350, 989),
    "NVIDIA H100 PCIe": Peaks(2000, 756),
    "NVIDIA H200": Peaks(4800, 989),
    "NVIDIA B200": Peaks(8000, 2250),
}


@dataclass
class Result:
    """One case: timed, skipped for a reason, or failed."""

    kernel: str
    models: str
    sizes: dict[str, int]
    microseconds: float | None = None
    gigabytes_per_s: float | None = None
    tflops: float | None = None
    share_of_bandwidth: float | None = None
    share_of_flops: float | None = None
    torch_microseconds: float | None = None
    speedup: float | None = None
    error: float | None = None
    skipped: str = ""
    failed: str = ""

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        head = f"{self.kernel:18} {self.models:24} {sizes:28}"
        if self.failed or self.skipped:
            return f"{head} {'FAILED: ' + self.failed if self.failed else self.skipped}"
        cells = [f"{self.microseconds:10.1f} µs", f"{self.gigabytes_per_s:8.1f} GB/s"]
        cells += [f"{self.tflops:7.1f} TFLOP/s" if self.tflops else " " * 15]
        shares = [x for x in (self.share_of_bandwidth, self.share_of_flops) if x is not None]
        cells += [f"{max(shares):4.0%} of peak" if shares else ""]
        cells += [f"{self.speedup:6.2f} × torch" if self.speedup else ""]
        return f"{head} {'  '.join(cells)}"


class Timer:
    """Times calls on the GPU, each with nothing in the L2 cache of what it reads."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        num_bytes = max(2 * properties.L2_cache_size, 128 << 20)
        self._flush = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def median(self, run: Callable[[], Any], num_runs: int, num_warm_runs: int) -> float:
        """Seconds."""
        for _ in range(num_warm_runs):
            run()
        return statistics.median(self.once(run) for _ in range(num_runs))

    def once(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def measure(case: Case, stock: Stock, timer: Timer, peaks: Peaks | None) -> Result:
    result = Result(case.kernel, case.models, case.sizes)
    if case.page_bytes > stock.arena_bytes:
        result.skipped = f"needs {case.page_bytes / 2**30:.1f} GiB of pages"
        return result
    try:
        work = case.build(stock)
        result.error = work.error()
        if not result.error <= TOLERANCE:
            result.failed = f"off from the reference by {result.error:.2g} of a row's size"
            return result
        fill(result, work, timer.median(work.run, NUM_RUNS, NUM_WARM_RUNS), peaks)
        if work.baseline is not None:
            add_baseline(result, work.baseline, timer)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        result.skipped = "out of memory"
    except Exception as error:
        result.failed = f"{type(error).__name__}: {first_line(error)}"
    return result


def fill(result: Result, work: Work, seconds: float, peaks: Peaks | None) -> None:
    result.microseconds = 1e6 * seconds
    result.gigabytes_per_s = work.num_bytes / seconds / 1e9
    if work.num_flops:
        result.tflops = work.num_flops / seconds / 1e12
    if peaks is not None:
        result.share_of_bandwidth = result.gigabytes_per_s / peaks.bandwidth
        if result.tflops is not None:
            result.share_of_flops = result.tflops / peaks.flops


def add_baseline(result: Result, baseline: Callable[[], Any], timer: Timer) -> None:
    """torch's time, with fewer runs where they take long; nothing where torch can't do it."""
    assert result.microseconds is not None
    try:
        baseline()
        num_runs = int(BASELINE_SECONDS / timer.once(baseline))
        num_runs = min(max(num_runs, MIN_BASELINE_RUNS), NUM_RUNS)
        result.torch_microseconds = 1e6 * timer.median(baseline, num_runs, 1)
        result.speedup = result.torch_microseconds / result.microseconds
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def all_cases() -> list[Case]:
    models = {name: ModelConfig.from_hf(config) for name, config in CONFIGS.items()}
    return [*row_cases(models), *expert_cases(models), *attention_cases(models)]


def quick(cases: Iterable[Case]) -> list[Case]:
    return [
        case
        for case in cases
        if all(size == QUICK.get(name, size) for name, size in case.sizes.items())
    ]


def run_all(cases: Sequence[Case], max_seconds: float) -> list[Result]:
    name = torch.cuda.get_device_name()
    free, _ = torch.cuda.mem_get_info()
    stock, timer = Stock("cuda", int(free * ARENA_SHARE)), Timer()
    started, results = time.monotonic(), []
    for case in cases:
        if time.monotonic() - started > max_seconds:
            result = Result(case.kernel, case.models, case.sizes, skipped="out of time")
        else:
            result = measure(case, stock, timer, PEAKS.get(name))
        results.append(result)
        print(result, flush=True)
        if result.failed and is_lost():
            print("the GPU refuses to go on", file=sys.stderr)
            break
    return results


def is_lost() -> bool:
    """After an illegal access a GPU does nothing more for this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one size of each kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--seconds", type=float, default=MAX_SECONDS, help="after which to stop")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a GPU, and torch finds none here", file=sys.stderr)
        return 2
    cases = quick(all_cases()) if options.quick else all_cases()
    with torch.inference_mode():
        results = run_all(cases, options.seconds)
    if options.json:
        figures = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "peaks": PEAKS.get(torch.cuda.get_device_name()),
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return any(result.failed for result in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
