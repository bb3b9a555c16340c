"""The arena's size, and the longest sequence it holds: exact, and honest when it's too small."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezel.engine import memory
from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.kv_layout import KVLayout
from bezel.engine.memory import (
    DeviceMemory,
    activation_bytes,
    arena_bytes,
    max_model_len,
    num_sequences,
)
from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.published import PUBLISHED

POSITIONS = 1000
LAYOUT = KVLayout(
    window=20, local_page_size=8, global_page_size=32, local_page_bytes=600, global_page_bytes=400
)
SECTOR = 1200  # two local pages or three global ones

layouts = st.builds(
    KVLayout,
    window=st.integers(1, 70),
    local_page_size=st.sampled_from([8, 16]),
    global_page_size=st.sampled_from([32, 64]),
    local_page_bytes=st.integers(1, 12).map(lambda n: n * 100),
    global_page_bytes=st.integers(1, 12).map(lambda n: n * 100),
)


def holds(layout: KVLayout, num_tokens: int, num_bytes: int) -> bool:
    """Whether the pages of every length up to `num_tokens` fit, each kind in its own sectors."""
    for n in range(1, num_tokens + 1):
        first = max(0, n - layout.window + 1) // layout.local_page_size
        local = (n - 1) // layout.local_page_size + 1 - first
        global_ = (n - 1) // layout.global_page_size + 1
        sectors = -(-local // layout.local_pages_per_sector)
        sectors += -(-global_ // layout.global_pages_per_sector)
        if sectors * layout.sector_bytes > num_bytes:
            return False
    return True


def model_of(positions: int) -> ModelConfig:
    """A small model; the arena asks it for its positions and for what steps take."""
    config = PUBLISHED["gemma-3-270m"] | {"max_position_embeddings": positions}
    return ModelConfig.from_hf(config)


MODEL = model_of(POSITIONS)


def arena(config: EngineConfig, memory: DeviceMemory) -> int:
    return arena_bytes(config, MODEL, LAYOUT, 2, memory)


def cpu(free_bytes: int) -> DeviceMemory:
    return DeviceMemory(is_gpu=False, total_bytes=10**12, free_bytes=free_bytes)


def test_the_flag_is_the_arena() -> None:
    assert arena(EngineConfig(kv_cache_memory_bytes=12_345), cpu(0)) == 12_345


def test_a_quarter_of_free_memory() -> None:
    assert arena(EngineConfig(), cpu(100_000)) == 25_000


def test_a_cpus_memory_is_what_the_system_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available_cpu_bytes", lambda: 100_000)
    found = DeviceMemory.of(torch.device("cpu"))
    assert found == DeviceMemory(is_gpu=False, total_bytes=100_000, free_bytes=100_000)


def test_a_gpus_memory_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7000, 9000))
    found = DeviceMemory.of(torch.device("cuda"))
    assert found == DeviceMemory(is_gpu=True, total_bytes=9000, free_bytes=7000)


def test_no_more_than_all_sequences_could_use() -> None:
    """1,000 tokens: 4 local pages in 2 sectors, 32 global ones in 11. 100 tokens: 2 and 2."""
    assert arena(EngineConfig(max_num_seqs=3), cpu(10**12)) == 3 * 13 * SECTOR
    config = EngineConfig(max_num_seqs=3, max_model_len=100)
    assert arena(config, cpu(10**12)) == 3 * 4 * SECTOR


def test_a_gpu_leaves_its_share_and_what_steps_take() -> None:
    """Of 40 GB, 5 are others' and 10 aren't to be used: 25, less the weights, less a step."""
    config = EngineConfig(gpu_memory_utilization=0.75, max_num_seqs=2000)
    gpu = DeviceMemory(is_gpu=True, total_bytes=40 * 10**9, free_bytes=35 * 10**9)
    step = activation_bytes(config, MODEL, 2)
    weights = 25 * 10**9 - step - 10_000
    assert arena(config, gpu.with_weights(weights)) == 10_000
    assert arena(config, gpu.with_weights(weights + 20_000)) == 0
    assert arena(config, gpu.with_weights(10**12)) == 0


def test_sequences_share_sectors() -> None:
    """60 tokens: 4 local and 2 global pages. Of three, 12 local pages take 6 sectors and 6 global
    ones 2; one by one they would take 9."""
    assert num_sequences(LAYOUT, [60], 8 * SECTOR) == 3
    assert num_sequences(LAYOUT, [60], 8 * SECTOR - 1) == 2
    assert num_sequences(LAYOUT, [60], 2 * SECTOR) == 0
    assert num_sequences(LAYOUT, [60], 0) == 0


def test_equally_many_of_several_lengths() -> None:
    """8 and 60 tokens: 1 + 4 local, 1 + 2 global pages. Of three each, 15 and 9: 8 and 3 sectors;
    of seven in all, 17.5 and 10.5: 9 and 4."""
    assert num_sequences(LAYOUT, [8, 60], 11 * SECTOR) == 6
    assert num_sequences(LAYOUT, [8, 60], 13 * SECTOR) == 7


def test_activations_of_a_published_model(real_configs: dict[str, Any]) -> None:
    """26B-A4B by hand: 16·512·2 + 2·512·4, 3·2112, 8·2816, 8·(2816 + 704) values a token; 64 parts
    of 16 outputs of 512 values and a sum a sequence."""
    model = ModelConfig.from_hf(real_configs["26B-A4B"])
    config = EngineConfig(max_num_seqs=100, max_num_batched_tokens=1000)
    per_token = (16_384 + 4_096 + 6_336 + 22_528 + 28_160) * 2
    logits = 262_144 * (2 + 3 * 4)
    parts = 64 * 16 * 513 * 4
    expected = 1000 * per_token + 100 * (logits + parts) + (1 << 30)
    assert activation_bytes(config, model, value_bytes=2) == expected


def test_activations_leave_room_for_a_prompts_log_probabilities(
    real_configs: dict[str, Any],
) -> None:
    """Logits of 64 rows, however few sequences there are."""
    model = ModelConfig.from_hf(real_configs["26B-A4B"])
    needed = [
        activation_bytes(EngineConfig(max_num_seqs=n, max_num_batched_tokens=1000), model, 2)
        for n in (1, 2, 64, 65)
    ]
    parts, row = 64 * 16 * 513 * 4, 262_144 * (2 + 3 * 4)
    assert [b - a for a, b in pairwise(needed)] == [parts, 62 * parts, parts + row]


def test_a_containers_limit_minus_what_it_uses(tmp_path: Path) -> None:
    """File caches that the system would give up count as free."""
    assert memory._container_bytes(tmp_path, 7_000) == 7_000
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    for text, expected in (("max\n", 7_000), ("4096\n", 1_596), ("2000\n", 0)):
        (tmp_path / "memory.max").write_text(text)
        assert memory._container_bytes(tmp_path, 7_000) == expected


def test_available_memory_is_the_smaller_of_system_and_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\n")
    files = {"/proc/meminfo": meminfo, "/sys/fs/cgroup": tmp_path}
    monkeypatch.setattr(memory, "Path", lambda name: files[name])
    assert memory._available_cpu_bytes() == 5000 * 1024
    (tmp_path / "memory.current").write_text("0\n")
    (tmp_path / "memory.stat").write_text("")
    (tmp_path / "memory.max").write_text("4096\n")
    assert memory._available_cpu_bytes() == 4096


@given(layout=layouts, num_sectors=st.integers(0, 40))
def test_promises_fit_at_every_length_on_the_way(layout: KVLayout, num_sectors: int) -> None:
    num_bytes = num_sectors * layout.sector_bytes + layout.sector_bytes // 2
    if holds(layout, 2, num_bytes):
        assert holds(layout, max_model_len(EngineConfig(), layout, 300, num_bytes), num_bytes)
    else:
        with pytest.raises(ConfigError, match="hold 0 tokens"):
            max_model_len(EngineConfig(), layout, 300, num_bytes)


def test_never_longer_than_the_model_or_the_flag() -> None:
    assert max_model_len(EngineConfig(), LAYOUT, POSITIONS, 10**9) == POSITIONS
    assert max_model_len(EngineConfig(max_model_len=77), LAYOUT, POSITIONS, 10**9) == 77


def test_an_arena_of_some_sectors() -> None:
    """4 local pages take 2 sectors, and 3 more hold 9 global pages of 32 tokens."""
    assert max_model_len(EngineConfig(), LAYOUT, POSITIONS, 5 * SECTOR) == 9 * 32
    assert max_model_len(EngineConfig(), LAYOUT, POSITIONS, 5 * SECTOR + SECTOR - 1) == 9 * 32
    # One sector for two local pages, one for three global pages: 16 tokens.
    assert max_model_len(EngineConfig(), LAYOUT, POSITIONS, 2 * SECTOR) == 16


@given(layout=layouts, wanted=st.integers(2, 300), num_sectors=st.integers(0, 10))
def test_the_error_names_the_number_of_bytes_that_would_do(
    layout: KVLayout, wanted: int, num_sectors: int
) -> None:
    config, num_bytes = EngineConfig(max_model_len=wanted), num_sectors * layout.sector_bytes
    try:
        assert max_model_len(config, layout, POSITIONS, num_bytes) == wanted
    except ConfigError as error:
        found = re.search(r"--kv-cache-memory-bytes (\d+)", error.message)
        assert found is not None
        needed = int(found[1])
        assert needed > num_bytes
        assert max_model_len(config, layout, POSITIONS, needed) == wanted
        with pytest.raises(ConfigError):
            max_model_len(config, layout, POSITIONS, needed - 1)


def test_the_error_in_words() -> None:
    with pytest.raises(ConfigError) as raised:
        max_model_len(EngineConfig(max_model_len=1000), LAYOUT, POSITIONS, 5 * SECTOR)
    assert raised.value.message == (
        "6,000 bytes for KV pages hold 288 tokens of one sequence; "
        "1,000 tokens need --kv-cache-memory-bytes 15600"
    )


def test_an_arena_for_nothing_is_an_error_without_the_flag_too() -> None:
    with pytest.raises(ConfigError, match=r"2 tokens need --kv-cache-memory-bytes 2400"):
        max_model_len(EngineConfig(), LAYOUT, POSITIONS, SECTOR)


@pytest.mark.parametrize("wanted", [-1, 0, 1, POSITIONS + 1])
def test_lengths_the_model_has_no_positions_for(wanted: int) -> None:
    with pytest.raises(ConfigError, match=f"--max-model-len {wanted} is not between 2 and"):
        max_model_len(EngineConfig(max_model_len=wanted), LAYOUT, POSITIONS, 10**9)
