"""How large the arena is, and the longest sequence it serves."""

import os
from pathlib import Path

import torch

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.kv_layout import KVLayout

CPU_SHARE = 0.25  # of available memory: the arena fills only as it is used, but never shrinks


def arena_bytes(
    config: EngineConfig, layout: KVLayout, max_positions: int, device: torch.device
) -> int:
    """Bytes for KV pages: the flag, or a share of free memory, but no more than could be used."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    longest = min(config.max_model_len or max_positions, max_positions)
    per_sequence = layout.num_sectors(layout.peak_pages(longest)) * layout.sector_bytes
    return min(_free_bytes(config, device), per_sequence * config.max_num_seqs)


def max_model_len(
    config: EngineConfig, layout: KVLayout, max_positions: int, num_bytes: int
) -> int:
    """The longest sequence that fits the arena alone, within what the model and the flag allow.

    Raises:
        ConfigError: the arena holds nothing, or less than `--max-model-len` asks for.
    """
    wanted = config.max_model_len
    if wanted is not None and not 1 < wanted <= max_positions:
        raise ConfigError(
            f"--max-model-len {wanted} is not between 2 and the model's {max_positions} positions"
        )
    fits = _longest_fit(layout, wanted or max_positions, num_bytes // layout.sector_bytes)
    if fits < 2 or (wanted is not None and fits < wanted):
        needed = layout.num_sectors(layout.peak_pages(wanted or 2)) * layout.sector_bytes
        raise ConfigError(
            f"{num_bytes:,} bytes for KV pages hold {fits:,} tokens of one sequence; "
            f"{wanted or 2:,} tokens need --kv-cache-memory-bytes {needed}"
        )
    return fits


def _longest_fit(layout: KVLayout, limit: int, num_sectors: int) -> int:
    """Largest length up to `limit` whose pages fit `num_sectors`, by bisection."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if layout.num_sectors(layout.peak_pages(middle)) <= num_sectors:
            low = middle
        else:
            high = middle - 1
    return low


def _free_bytes(config: EngineConfig, device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - total * (1 - config.gpu_memory_utilization)))
    return int(_available_cpu_bytes() * CPU_SHARE)


def _available_cpu_bytes() -> int:
    """Memory the system could give out now, within the limit of a container."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # its figure counts what caches would give up
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text))
    return available
