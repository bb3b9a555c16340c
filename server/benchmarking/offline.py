"""`bezel bench latency` and `throughput`: an engine in this process, without HTTP or tokenizer.

Prompts of random tokens begin together and get answers of full length, greedily; again and again,
with new prompts each time.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from random import Random
from typing import TYPE_CHECKING, Any

from bezel.engine.config import option
from bezel.engine.errors import ConfigError
from bezel.engine.messages import AddSequence
from bezel.engine.sampling_params import SamplingParams
from bezel.server.version import VERSION

if TYPE_CHECKING:
    from bezel.engine.core import Engine

_FIRST_TOKEN_ID = 10  # those before it are padding, ends and other tokens without text


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineBenchmark:
    """Lengths are in tokens, and exact. One more iteration than `num_iters` runs before them."""

    input_len: int = option(32, "Tokens of a prompt")
    output_len: int = option(128, "Tokens of an answer")
    num_iters: int = option(5, "Runs, of which the median is reported")

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ConfigError: naming the value that is out of range.
        """
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value < 1:
                flag = "--" + spec.name.replace("_", "-")
                raise ConfigError(f"{flag} must be at least 1, got {value}")

    @property
    def num_seqs(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyBenchmark(OfflineBenchmark):
    """How long a batch takes."""

    batch_size: int = option(1, "Prompts at once")

    @property
    def num_seqs(self) -> int:
        return self.batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputBenchmark(OfflineBenchmark):
    """How much many prompts get done; as many run at once as the engine's limits allow."""

    num_prompts: int = option(32, "Prompts, all there from the start")

    @property
    def num_seqs(self) -> int:
        return self.num_prompts


@dataclass(frozen=True, slots=True)
class Iteration:
    """Seconds from the start: until the last token, and until a prompt's first, on average."""

    total_s: float
    ttft_s: float


def run_offline(
    engine: "Engine",
    benchmark: OfflineBenchmark,
    on_progress: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Iteration]:
    """The iterations that count.

    Raises:
        ConfigError: prompt and answer are longer than the engine allows.
    """
    longest = engine.info.max_model_len
    if benchmark.input_len + benchmark.output_len > longest:
        raise ConfigError(f"--input-len and --output-len together exceed {longest} tokens")
    random = Random(engine.config.seed)
    iterations = []
    for _ in range(benchmark.num_iters + 1):
        iterations.append(_iteration(engine, benchmark, random, clock))
        on_progress()
    return iterations[1:]


def _iteration(
    engine: "Engine", benchmark: OfflineBenchmark, random: Random, clock: Callable[[], float]
) -> Iteration:
    vocabulary = range(_FIRST_TOKEN_ID, engine.info.vocab_size)
    params = SamplingParams(max_tokens=benchmark.output_len, temperature=0.0, ignore_eos=True)
    prompts = [random.choices(vocabulary, k=benchmark.input_len) for _ in range(benchmark.num_seqs)]
    started_s = clock()
    for index, prompt_ids in enumerate(prompts):
        engine.add(AddSequence(str(index), prompt_ids, params))
    first_s: dict[str, float] = {}
    while engine.has_work:
        outputs = engine.step().outputs
        now_s = clock() - started_s
        for output in outputs:
            if output.token_ids:
                first_s.setdefault(output.request_id, now_s)
    return Iteration(clock() - started_s, statistics.fmean(first_s.values()))


def to_json(engine: "Engine", benchmark: OfflineBenchmark, iterations: list[Iteration]) -> Any:
    """Everything, in plain values; what isn't of one iteration is a median."""
    total_s = statistics.median(iteration.total_s for iteration in iterations)
    ttft_s = statistics.median(iteration.ttft_s for iteration in iterations)
    num_output_tokens = benchmark.num_seqs * benchmark.output_len
    return {
        "model": engine.checkpoint.name,
        "dtype": engine.info.dtype,
        "device": engine.info.device,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "bezel": VERSION,
        "arguments": asdict(benchmark),
        "engine": asdict(engine.config),
        "results": {
            "total_s": total_s,
            "ttft_s": ttft_s,
            "requests_per_s": benchmark.num_seqs / total_s,
            "output_tokens_per_s": num_output_tokens / total_s,
            "all_tokens_per_s": (benchmark.num_seqs * benchmark.input_len + num_output_tokens)
            / total_s,
        },
        "iterations": [asdict(iteration) for iteration in iterations],
    }


def to_text(content: Any) -> str:
    """What `to_json` made, in a few lines."""
    arguments, results = content["arguments"], content["results"]
    num_seqs = arguments.get("batch_size") or arguments["num_prompts"]
    totals_s = [iteration["total_s"] for iteration in content["iterations"]]
    return "\n".join(
        [
            f"{content['model']} in {content['dtype']} on {content['device']}",
            f"workload    {num_seqs:,} × ({arguments['input_len']:,} + "
            f"{arguments['output_len']:,} tokens), median of {len(totals_s)}",
            f"time        {results['total_s']:.4g} s, from {min(totals_s):.4g} to "
            f"{max(totals_s):.4g}; {results['ttft_s']:.4g} s to the first token",
            f"throughput  {results['requests_per_s']:.2f} requests/s, "
            f"{results['output_tokens_per_s']:,.1f} output tokens/s, "
            f"{results['all_tokens_per_s']:,.1f} with those of prompts",
        ]
    )
