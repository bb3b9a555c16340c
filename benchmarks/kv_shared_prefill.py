"""What a prefill gains where layers share keys and values.

    python benchmarks/kv_shared_prefill.py [--sevenths N] [--tokens N] [--pairs N]

Of Gemma 4 E4B's 42 layers the last 18 only read keys and values of others, so a prompt's last token
alone goes through them. Here all tokens do so (A), then the last one (B), A B A B …, in one engine
with the same weights: random ones, of E4B's widths and its share of such layers, 4 + 3 of 24 + 18
(`--sevenths N` for 4 N + 3 N). A ratio is of two prefills one right after the other. Nothing is
said of quality, and little of absolute times, for the vocabulary is small.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

# As `bezel serve` does, before torch is loaded: see server/cli.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.sampling_params import SamplingParams

VOCAB = 4096
KV_CACHE_BYTES = 1 << 30


def write_checkpoint(path: str, sevenths: int) -> None:
    """E4B with fewer layers: of those that own keys and values, and of the others, the last one and
    every sixth before it is global."""
    owning, sharing = 4 * sevenths, 3 * sevenths
    to_go = [*range(owning, 0, -1), *range(sharing, 0, -1)]
    settings = PUBLISHED["gemma-4-E4B"] | dict(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        num_hidden_layers=owning + sharing,
        num_kv_shared_layers=sharing,
        layer_types=[_kind(number) for number in to_go],
        eos_token_id=None,
    )
    torch.manual_seed(0)
    config = Gemma4TextConfig(**settings)
    Gemma4ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def _kind(num_to_go: int) -> str:
    return "sliding_attention" if (num_to_go - 1) % 6 else "full_attention"


def prefill_s(engine: Engine, num_tokens: int, rng: random.Random) -> float:
    """Seconds that a lone prompt takes to its first token."""
    prompt = [rng.randrange(10, VOCAB) for _ in range(num_tokens)]
    started = time.perf_counter()
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0))
    return time.perf_counter() - started


def measure(engine: Engine, num_tokens: int, num_pairs: int) -> list[tuple[float, float]]:
    """Seconds with all rows in all layers, and with those that are wanted; once more, uncounted."""
    model, rng = engine.runner.model, random.Random(0)
    forward = model.forward

    def forward_all(batch: Any, kv_cache: Any) -> torch.Tensor:
        hidden_TD: torch.Tensor = forward(replace(batch, wanted=None), kv_cache)
        return hidden_TD

    pairs = []
    for _ in range(num_pairs + 1):
        model.forward = forward_all
        all_s = prefill_s(engine, num_tokens, rng)
        model.forward = forward
        pairs.append((all_s, prefill_s(engine, num_tokens, rng)))
    return pairs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sevenths", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(path, args.sevenths)
        engine = Engine(
            EngineConfig(
                model=path,
                dtype="bfloat16",
                kv_cache_memory_bytes=KV_CACHE_BYTES,
                enable_prefix_caching=False,
                max_num_batched_tokens=args.tokens,
            )
        )
    pairs = measure(engine, args.tokens, args.pairs)
    ratios = [all_s / wanted_s for all_s, wanted_s in pairs]
    medians = [statistics.median(seconds) for seconds in zip(*pairs, strict=True)]
    print(f"{args.tokens} tokens, {4 * args.sevenths} layers and {3 * args.sevenths} that share,")
    print(f"{engine.info.dtype}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}")
    print(f"all rows in all layers  {medians[0]:7.2f} s")
    print(f"wanted rows             {medians[1]:7.2f} s")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ratio, median of {len(ratios)} pairs: {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
