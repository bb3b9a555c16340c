"""What rounding weights costs: `python benchmarks/quality.py [MODEL]`.

Every format predicts each token of tests/data/quality.txt from the ones before it, in pieces of
1,024 tokens, and is compared with the checkpoint's values in float32:

    perplexity   exp of the mean surprise at the token that comes
    KL           mean Kullback-Leibler divergence from float32's distribution, in nats
    same top     share of positions with the same likeliest token

The engine's own model computes all of it, on the CPU. All formats are in memory at once, 2.5 GB for
the default model, which takes about a minute.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.engine.batch import Batch
from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.messages import AddSequence
from bezel.engine.planning.machine import plan_of
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.tokenizer import Tokenizer

TEXT = Path(__file__).parents[1] / "tests" / "data" / "quality.txt"
PIECE = 1024
ROWS_AT_ONCE = 128  # of logits, 134 MB
# Name, --dtype and --quantization; the first is what the others are compared with.
FORMATS = (
    ("float32", "float32", "none"),
    ("bfloat16", "bfloat16", "none"),
    ("auto", "auto", "auto"),
    ("int8", "auto", "int8"),
    ("int4", "auto", "int4"),
)


@dataclass(slots=True)
class Quality:
    """Sums over `num_tokens` predicted tokens."""

    num_tokens: int = 0
    surprise: float = 0.0
    divergence: float = 0.0
    num_same_top: int = 0

    def add(self, logprobs_NV: Tensor, reference_NV: Tensor, next_N: Tensor) -> None:
        self.num_tokens += len(next_N)
        self.surprise -= logprobs_NV.gather(1, next_N[:, None]).sum().item()
        self.divergence += (reference_NV.exp() * (reference_NV - logprobs_NV)).sum().item()
        self.num_same_top += int((logprobs_NV.argmax(1) == reference_NV.argmax(1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.surprise / self.num_tokens)


def hidden_states(engine: Engine, token_ids: list[int]) -> Tensor:
    """Of one prompt, T×D, as the engine computes them in one step."""
    engine.add(AddSequence("piece", token_ids, SamplingParams(max_tokens=1)))
    step = engine.scheduler.schedule()
    batch = Batch.build(step, engine.runner.layout, engine.runner.device)
    hidden_TD: Tensor = engine.runner.model(batch, engine.runner.kv_cache)
    engine.scheduler.commit(step, [0])
    return hidden_TD


def pieces(token_ids: list[int], bos: list[int]) -> list[list[int]]:
    """Each begins as a text does."""
    size = PIECE - len(bos)
    return [bos + token_ids[start : start + size] for start in range(0, len(token_ids), size)]


@torch.inference_mode()
def measure(engines: list[Engine], all_pieces: list[list[int]]) -> list[Quality]:
    found = [Quality() for _ in engines]
    for piece in all_pieces:
        hidden = [hidden_states(engine, piece) for engine in engines]
        next_T = torch.tensor(piece[1:])
        for start in range(0, len(next_T), ROWS_AT_ONCE):
            next_N = next_T[start : start + ROWS_AT_ONCE]
            rows = slice(start, start + len(next_N))
            logprobs = (
                F.log_softmax(engine.runner.model.compute_logits(hidden_TD[rows]), dim=1)
                for engine, hidden_TD in zip(engines, hidden, strict=True)
            )
            reference_NV = next(logprobs)
            found[0].add(reference_NV, reference_NV, next_N)
            for quality, logprobs_NV in zip(found[1:], logprobs, strict=True):
                quality.add(logprobs_NV, reference_NV, next_N)
    return found


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "default"
    engines = [
        Engine(
            EngineConfig(
                model=model,
                dtype=dtype,
                quantization=quantization,
                device="cpu",
                max_model_len=2 * PIECE,
                kv_cache_memory_bytes=1 << 28,
                enable_prefix_caching=False,
            )
        )
        for _, dtype, quantization in FORMATS
    ]
    tokenizer = Tokenizer.load(engines[0].checkpoint)
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    found = measure(engines, pieces(token_ids, tokenizer.encode("", add_special_tokens=True)))
    print(f"{engines[0].checkpoint.name}, {found[0].num_tokens:,} tokens, {time.strftime('%F')}")
    print(f"{'':9} {'MB':>7} {'perplexity':>11} {'change':>8} {'KL':>8} {'same top':>9}")
    for (name, _, _), engine, quality in zip(FORMATS, engines, found, strict=True):
        weights_mb = plan_of(engine).memory.weight_bytes / 1e6
        change = quality.perplexity / found[0].perplexity - 1
        print(
            f"{name:9} {weights_mb:7,.0f} {quality.perplexity:11.3f} {change:+8.2%} "
            f"{quality.divergence / quality.num_tokens:8.4f} "
            f"{quality.num_same_top / quality.num_tokens:9.1%}"
        )


if __name__ == "__main__":
    main()
