"""A small engine under a clock that anyone can compute: 10 ms a step and 1 ms a token."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import KVLayout
from bezel.engine.planning.device import PRESETS
from bezel.engine.planning.step_cost import Load
from bezel.engine.simulation.setup import Setup
from bezel.engine.simulation.simulator import Simulator, StepClock
from bezel.engine.simulation.trace import TraceRequest

WINDOW = 32
LAYOUT = KVLayout(WINDOW, 8, 32, local_page_bytes=24, global_page_bytes=32)


class Ticks:
    def load(self) -> Load:
        return Load(WINDOW)

    def seconds(self, load: Load) -> float:
        return 0.010 + 0.001 * load.num_tokens


@pytest.fixture(scope="session")
def simulator() -> Callable[..., Simulator]:
    def make(
        requests: Iterable[TraceRequest],
        clock: StepClock | None = None,
        num_sectors: int = 40,
        max_model_len: int = 400,
        **flags: int,
    ) -> Simulator:
        settings = {"max_num_seqs": 4, "max_num_batched_tokens": 64} | flags
        arena_bytes = num_sectors * LAYOUT.sector_bytes
        clock = clock or Ticks()
        return Simulator(
            EngineConfig(**settings), LAYOUT, arena_bytes, max_model_len, clock, requests
        )

    return make


@pytest.fixture(scope="session")
def setup() -> Setup:
    """Of the smallest model, on a CPU with 4 GB."""
    device = replace(PRESETS["cpu"], memory_bytes=4 * 10**9)
    return Setup.of(EngineConfig(model="gemma-3-270m"), device)
