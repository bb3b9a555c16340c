"""A mixture of experts against the memory: `python benchmarks/moe_decode.py FILE`.

    read    weights outside the experts + Σ over layers of distinct experts chosen · bytes of one
    bound   tokens of a step ÷ (read ÷ read bandwidth)

FILE is a checkpoint, such as one of `moe_checkpoint.py`. Printed are how long it takes to load, the
most memory this process has had, its own and that of the mapped file, and tokens per second when 1
and 8 sequences decode. Which experts steps choose is counted in a few steps computed one by one, as
recorded ones don't pass through Python. Bandwidth is measured before each round as in
`decode_limit.py`; a ratio is the median of the rounds'.
"""

import argparse
import json
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decoding import FORMATS, Decoding, build_engine  # first: it sets how threads wait

# isort: split

import torch
from decode_limit import READ_BYTES, Bandwidth
from torch import Tensor

from bezel.engine.core import Engine
from bezel.engine.layers.moe import Experts, Router
from bezel.kernels.packed import PackedWeight

CONTEXT, WARM_UP_STEPS, NUM_STEPS, COUNTED_STEPS = 32, 4, 16, 3
KV_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians of all rounds. `experts` is the mean number of distinct ones a layer reads a step."""

    num_seqs: int
    experts: float
    read_bytes: float
    step_ms: float
    tokens_per_s: float
    bound_by_sum: float
    bound_by_loop: float
    ratio_to_sum: float
    ratio_to_loop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes: the most that were resident at once, and what is now."""

    peak: int
    own: int
    of_files: int

    @classmethod
    def of_this_process(cls) -> "Memory":
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)

        def now(name: str) -> int:
            return int(values[name].split()[0]) << 10

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return cls(peak=peak, own=now("RssAnon"), of_files=now("RssFile"))


def weight_bytes(engine: Engine) -> tuple[int, int]:
    """Bytes that every step reads, and bytes of one expert of each layer, summed over the layers.

    An untied embedding table is read a row at a time.
    """
    config = engine.runner.model_config
    assert config.moe is not None, "the checkpoint has no experts"
    always, of_experts = 0, 0
    for name, module in engine.runner.model.named_modules():
        if name == "embed_tokens" and not config.tie_word_embeddings:
            continue
        packed = [value for value in vars(module).values() if isinstance(value, PackedWeight)]
        size = sum(weight.num_bytes for weight in packed)
        size += sum(p.numel() * p.itemsize for p in module.parameters(recurse=False))
        if isinstance(module, Experts):
            of_experts += size // config.moe.num_experts
        else:
            always += size
    return always, of_experts


def count_experts(batch: Decoding) -> float:
    """Mean number of distinct experts that a layer reads in a step."""
    counts: list[int] = []

    def count(module: Any, arguments: Any, result: tuple[Tensor, Tensor]) -> None:
        counts.append(len(result[0].unique()))

    runner = batch.engine.runner
    hooks = [
        module.register_forward_hook(count)
        for module in runner.model.modules()
        if isinstance(module, Router)
    ]
    programs, runner.decode_programs = runner.decode_programs, None
    batch.steps_s(COUNTED_STEPS)
    runner.decode_programs = programs
    for hook in hooks:
        hook.remove()
    return statistics.mean(counts)


def measure(engine: Engine, num_seqs: int, num_rounds: int) -> Row:
    values, batch = torch.zeros(READ_BYTES // 4), Decoding(engine)
    always, of_experts = weight_bytes(engine)
    batch.fill(num_seqs, CONTEXT)
    batch.steps_s(WARM_UP_STEPS)
    experts = count_experts(batch)
    read = always + of_experts * experts
    rounds = []
    for _ in range(num_rounds):
        bandwidth = Bandwidth.measure(values)
        rounds.append((statistics.median(batch.steps_s(NUM_STEPS)), bandwidth))
    batch.empty()
    step_s = statistics.median(seconds for seconds, _ in rounds)

    def bound(rates: list[float]) -> float:
        return num_seqs * statistics.median(rates) / read

    return Row(
        num_seqs=num_seqs,
        experts=experts,
        read_bytes=read,
        step_ms=1e3 * step_s,
        tokens_per_s=num_seqs / step_s,
        bound_by_sum=bound([b.torch_sum for _, b in rounds]),
        bound_by_loop=bound([b.plain_loop for _, b in rounds]),
        ratio_to_sum=statistics.median(s * b.torch_sum / read for s, b in rounds),
        ratio_to_loop=statistics.median(s * b.plain_loop / read for s, b in rounds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", default="default", choices=list(FORMATS))
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="steps that aren't recorded")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    started = time.perf_counter()
    engine = build_engine(
        arguments.format,
        str(arguments.file),
        kv_cache_memory_bytes=KV_BYTES,
        enforce_eager=arguments.eager,
    )
    load_s, memory = time.perf_counter() - started, Memory.of_this_process()
    rows = [measure(engine, num, arguments.rounds) for num in arguments.sequences]
    if arguments.json:
        figures = {"load_s": load_s, "memory": asdict(memory), "rows": [asdict(r) for r in rows]}
        print(json.dumps(figures, indent=1))
        return
    gb = {name: value / 1e9 for name, value in asdict(memory).items()}
    print(f"ready after {load_s:.1f} s, at most {gb['peak']:.1f} GB resident,", end=" ")
    print(f"then {gb['own']:.1f} GB and {gb['of_files']:.1f} GB of mapped files\n")
    print("| Sequences | Experts | GB a step | step, ms | tokens/s | bound, sum; loop | ÷ |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        bounds = f"{r.bound_by_sum:.1f}; {r.bound_by_loop:.1f}"
        ratios = f"{r.ratio_to_sum:.2f}; {r.ratio_to_loop:.2f}"
        step = f"{r.read_bytes / 1e9:.2f} | {r.step_ms:.1f} | {r.tokens_per_s:.1f}"
        print(f"| {r.num_seqs} | {r.experts:.1f} | {step} | {bounds} | {ratios} |")


if __name__ == "__main__":
    main()
