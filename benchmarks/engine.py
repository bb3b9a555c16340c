"""Tokens per second of the engine alone, without HTTP: `python benchmarks/engine.py [MODEL]`.

Prompts of 32 random tokens, 64 tokens out, end of sequence ignored, greedy; median of five runs
each, after one that isn't counted. Figures of different machines can't be compared.
"""

import os
import platform
import random
import statistics
import sys
import time

# As `bezel serve` does, before torch is loaded: see server/cli.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.sampling_params import SamplingParams

NUM_RUNS = 5
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64


def main() -> None:
    engine = Engine(EngineConfig(model=sys.argv[1] if len(sys.argv) > 1 else "default"))
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    rng = random.Random(0)
    info = engine.info
    print(f"{engine.checkpoint.name}, {info.dtype} on {info.device}, {os.cpu_count()} CPUs,")
    print(f"{platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    for num_seqs in (1, 8, 32):
        rates = []
        for _ in range(NUM_RUNS + 1):
            prompts = [
                [rng.randrange(10, info.vocab_size) for _ in range(PROMPT_TOKENS)]
                for _ in range(num_seqs)
            ]
            started = time.perf_counter()
            engine.generate(prompts, params)
            rates.append(num_seqs * OUTPUT_TOKENS / (time.perf_counter() - started))
        print(f"{num_seqs:3} at once: {statistics.median(rates[1:]):7.1f} tokens/s")


if __name__ == "__main__":
    main()
