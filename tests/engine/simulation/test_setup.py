"""What a device has left for pages, worked out from its data sheet."""

from dataclasses import replace

import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.memory import CPU_SHARE, activation_bytes
from bezel.engine.planning.device import PRESETS
from bezel.engine.simulation.setup import Setup


def test_pages_get_what_weights_and_activations_leave_of_a_gpu() -> None:
    config = EngineConfig(model="gemma-4-31B", gpu_memory_utilization=0.9)
    setup = Setup.of(config, PRESETS["h100"])
    needed = activation_bytes(config, setup.model.config, 2)
    left = 80 * 10**9 * 0.9 - setup.model.weight_bytes - needed
    assert setup.arena_bytes == pytest.approx(left, abs=2)
    assert 60e9 < setup.model.weight_bytes < 63e9, "31 billion parameters of two bytes"
    assert setup.config.prefix_cache_memory_bytes is None
    assert setup.model.layout.window == 1024


def test_a_cpu_gives_a_share_and_its_cache_an_eighth() -> None:
    device = replace(PRESETS["cpu"], memory_bytes=3 * 10**9)
    setup = Setup.of(EngineConfig(model="gemma-3-270m"), device)
    left = int((3 * 10**9 - setup.model.weight_bytes) * CPU_SHARE)
    assert setup.arena_bytes == left
    assert setup.config.prefix_cache_memory_bytes == left // 8
    asked = EngineConfig(model="gemma-3-270m", prefix_cache_memory_bytes=5)
    assert Setup.of(asked, device).config.prefix_cache_memory_bytes == 5


def test_the_flags_of_pages_and_numbers_are_heeded() -> None:
    config = EngineConfig(
        model="google/gemma-3-270m",
        kv_cache_memory_bytes=10**8,
        dtype="float32",
        block_size=32,
        max_model_len=500,
    )
    setup = Setup.of(config, PRESETS["h200"])
    assert (setup.arena_bytes, setup.max_model_len) == (10**8, 500)
    assert (setup.model.layout.local_page_size, setup.model.value_bytes) == (32, 4)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("gemma-4-31B", {}, "20,000,000,000 bytes of device memory don't hold weights of 61,"),
        ("gemma-3-270m", {"kv_cache_memory_bytes": 2 * 10**10}, "and KV pages of 20,000,000,000"),
        ("gemma-3-270m", {"kv_cache_memory_bytes": 10}, "10 bytes for KV pages hold 0 tokens"),
        ("gemma-9", {}, "gemma-9: no such directory or file, nor a model known by name"),
    ],
)
def test_what_does_not_fit(model: str, flags: dict[str, int], message: str) -> None:
    device = replace(PRESETS["h100"], memory_bytes=20 * 10**9)
    with pytest.raises(ConfigError) as caught:
        Setup.of(EngineConfig(model=model, **flags), device)
    assert message in caught.value.message
