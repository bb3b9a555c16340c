"""Sequences that decode in an engine of this process, for benchmarks that time its steps."""

import os
import random
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# As `bezel serve` does, before torch is loaded: see server/cli.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.messages import AddSequence, FinishReason
from bezel.engine.sampling_params import SamplingParams

# What `bezel serve` is told for each format of the weights.
FORMATS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "default": {},
        "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
        "int8": {"quantization": "int8"},
        "int4": {"quantization": "int4"},
        "float32": {"dtype": "float32", "quantization": "none"},
    }
)
KV_BYTES = 1 << 30
MOST_STEPS = 256  # of one fill
_FIRST_TOKEN_ID = 10  # those before it are padding, ends and other tokens without text


def build_engine(format: str, model: str = "default", **settings: Any) -> Engine:
    """An engine with the weights of a model in one of the FORMATS, on the CPU."""
    named = {**FORMATS[format], "kv_cache_memory_bytes": KV_BYTES, **settings}
    return Engine(EngineConfig(model=model, device="cpu", **named))


class Decoding:
    """A batch of an engine: `fill` it, time steps, `empty` it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._random = random.Random(0)
        self._ids: list[str] = []

    def fill(self, num_running: int, context: int, num_waiting: int = 0) -> None:
        """Compute prompts of random tokens, all different, to their first output token.

        Those that wait come last; the engine has to have as many seats as run.
        """
        running = self._add(num_running, context)
        pending = set(running)
        while pending:
            pending -= {output.request_id for output in self.engine.step().outputs}
        self._add(num_waiting, context)

    def step_s(self) -> float:
        """Seconds of one step, in which each running sequence gets a token."""
        started = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - started

    def steps_s(self, num_steps: int) -> list[float]:
        return [self.step_s() for _ in range(num_steps)]

    def empty(self) -> None:
        """End all sequences."""
        for request_id in self._ids:
            self.engine.finish(request_id, FinishReason.ABORT)
        self._ids = []

    def _add(self, num: int, context: int) -> list[str]:
        vocabulary = range(_FIRST_TOKEN_ID, self.engine.info.vocab_size)
        params = SamplingParams(max_tokens=MOST_STEPS, temperature=0.0, ignore_eos=True)
        names = [f"{len(self._ids) + i}" for i in range(num)]
        for name in names:
            prompt_ids = self._random.choices(vocabulary, k=context)
            self.engine.add(AddSequence(name, prompt_ids, params))
        self._ids += names
        return names
