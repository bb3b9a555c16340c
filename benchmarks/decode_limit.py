"""One stream against the memory: `python benchmarks/decode_limit.py [FORMAT …]`.

    limit   bytes of weights that a step reads ÷ read bandwidth
    ratio   time of a step ÷ limit

A step of one sequence reads every weight once. What a cache still holds of the step before needn't
come from memory, so the limit is one of memory, not of nature. Bandwidth is measured anew before
every measurement, twice: by torch's sum over 256 MiB, and by a plain loop over the same bytes, also
on all threads; which is faster depends on the machine, so both ratios are given. Formats take turns
within a round. A ratio is the median of the rounds', a step's time in a round the median of its
steps, scheduler and sampler included.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from decoding import FORMATS, Decoding, build_engine  # first: it sets how threads wait

# isort: split

import numpy as np
import torch
from numba import njit, prange

from bezel.engine.core import Engine
from bezel.kernels.packed import PackedWeight

READ_BYTES = 256 << 20
NUM_READS = 9
CONTEXT, WARM_UP_STEPS, NUM_STEPS = 32, 8, 48
# Read a row at a time, or by other models' layers only.
NOT_READ = ("embed_tokens_per_layer",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians of all rounds; bandwidths are those of the rounds of this format."""

    format: str
    weight_bytes: int
    step_ms: float
    sum_ratio: float  # by the bandwidth of torch's sum
    loop_ratio: float  # by that of the plain loop
    lowest: float  # of loop_ratio
    highest: float


def weight_bytes(engine: Engine) -> int:
    """Bytes of weights that every step of a dense model reads."""
    config = engine.runner.model_config
    assert config.moe is None, "of a mixture of experts a step reads only some"
    not_read = NOT_READ if config.tie_word_embeddings else (*NOT_READ, "embed_tokens")
    total = 0
    for name, module in engine.runner.model.named_modules():
        if not name.endswith(not_read):
            packed = [value for value in vars(module).values() if isinstance(value, PackedWeight)]
            total += sum(weight.num_bytes for weight in packed)
            total += sum(p.numel() * p.itemsize for p in module.parameters(recurse=False))
    return total


@njit(parallel=True, nogil=True)
def _plain_sum(values: Any, num_threads: int) -> int:
    total = 0
    size = len(values) // num_threads
    for i in prange(num_threads):
        own = values[i * size : (i + 1) * size]
        part = 0
        for k in range(len(own)):  # from 0 on, or the compiler has to expect negative ones
            part += own[k]
        total += part
    return total


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second that all threads together read."""

    torch_sum: float
    plain_loop: float

    @classmethod
    def measure(cls, values: torch.Tensor) -> "Bandwidth":
        """By two ways of summing `values` (float32)."""
        array, num_threads = values.numpy().view(np.int64), torch.get_num_threads()
        return cls(_rate(values.sum, values), _rate(lambda: _plain_sum(array, num_threads), values))


def _rate(read: Callable[[], object], values: torch.Tensor) -> float:
    read()
    times_s = []
    for _ in range(NUM_READS):
        started = time.perf_counter()
        read()
        times_s.append(time.perf_counter() - started)
    return values.numel() * values.itemsize / statistics.median(times_s)


def rounds(formats: list[str], model: str, num: int) -> Iterator[tuple[str, int, float, Bandwidth]]:
    """Format, bytes, seconds of a step, and the bandwidth right before it."""
    values = torch.zeros(READ_BYTES // 4)
    batches = {name: Decoding(build_engine(name, model)) for name in formats}
    for _ in range(num):
        for name, batch in batches.items():
            bandwidth = Bandwidth.measure(values)
            batch.fill(1, CONTEXT)
            batch.steps_s(WARM_UP_STEPS)
            seconds = statistics.median(batch.steps_s(NUM_STEPS))
            batch.empty()
            yield name, weight_bytes(batch.engine), seconds, bandwidth


def row(format: str, measured: list[tuple[int, float, Bandwidth]]) -> Row:
    """From the rounds of one format: bytes, seconds of a step, bandwidth."""
    by_sum = [seconds / (size / bandwidth.torch_sum) for size, seconds, bandwidth in measured]
    by_loop = [seconds / (size / bandwidth.plain_loop) for size, seconds, bandwidth in measured]
    return Row(
        format=format,
        weight_bytes=measured[0][0],
        step_ms=1e3 * statistics.median(seconds for _, seconds, _ in measured),
        sum_ratio=statistics.median(by_sum),
        loop_ratio=statistics.median(by_loop),
        lowest=min(by_loop),
        highest=max(by_loop),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    formats = arguments.formats or [*FORMATS]
    measured = list(rounds(formats, arguments.model, arguments.rounds))
    rows = [row(name, [one[1:] for one in measured if one[0] == name]) for name in formats]
    speeds = {
        name: statistics.median(getattr(one[3], name) for one in measured) / 1e9
        for name in ("torch_sum", "plain_loop")
    }
    if arguments.json:
        print(json.dumps({"gb_per_s": speeds, "formats": [asdict(r) for r in rows]}, indent=1))
        return
    print(", ".join(f"{name.replace('_', ' ')} {gb:.1f} GB/s" for name, gb in speeds.items()))
    print("\n| Weights | MB a step | step, ms | ÷ limit by sum | ÷ limit by loop | from … to |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        ratios = f"{r.sum_ratio:.2f} | {r.loop_ratio:.2f} | {r.lowest:.2f} … {r.highest:.2f}"
        print(f"| {r.format} | {r.weight_bytes / 1e6:,.0f} | {r.step_ms:.2f} | {ratios} |")


if __name__ == "__main__":
    main()
