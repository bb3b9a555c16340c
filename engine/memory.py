"""How large the arena is, the longest sequence it serves, and how many of a length.

The engine asks with the memory that its device has left, the planner with that of a device it has
only read of.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.logprobs import PROMPT_ROWS
from bezel.engine.model_config import ModelConfig
from bezel.kernels.decode_combine import Splits

FLOAT32_BYTES = 4
LOGITS_COPIES = 3  # softcapped, kept for log-probabilities, and what looking through them takes
WORKSPACE_BYTES = 1 << 30  # cuBLAS, CUDA graphs, what the allocator can't join
CPU_SHARE = 0.25  # of available memory: the arena fills only as it is used, but never shrinks


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Of a GPU, or of the system for a CPU; `free_bytes` of it are nobody's."""

    is_gpu: bool
    total_bytes: int
    free_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> "DeviceMemory":
        """As it is now."""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return cls(True, total, free)
        available = _available_cpu_bytes()
        return cls(False, available, available)

    def with_weights(self, num_bytes: int) -> "DeviceMemory":
        """When they have been loaded."""
        return replace(self, free_bytes=max(0, self.free_bytes - num_bytes))

    def usable_bytes(self, config: EngineConfig) -> int:
        """What of it the engine may take."""
        if self.is_gpu:
            left_alone = self.total_bytes * (1 - config.gpu_memory_utilization)
            return max(0, int(self.free_bytes - left_alone))
        return int(self.free_bytes * CPU_SHARE)


def arena_bytes(
    config: EngineConfig,
    model: ModelConfig,
    layout: KVLayout,
    value_bytes: int,
    memory: DeviceMemory,
) -> int:
    """Bytes for KV pages: the flag, or a share of free memory, but no more than could be used.

    `memory` is that beside the weights. On a GPU, what steps compute with is left free.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    positions = model.max_position_embeddings
    longest = min(config.max_model_len or positions, positions)
    per_sequence = layout.num_sectors(layout.peak_pages(longest)) * layout.sector_bytes
    reserved_bytes = activation_bytes(config, model, value_bytes) if memory.is_gpu else 0
    left = max(0, memory.usable_bytes(config) - reserved_bytes)
    return min(left, per_sequence * config.max_num_seqs)


def prefix_cache_bytes(config: EngineConfig, is_gpu: bool, num_bytes: int) -> int | None:
    """Most bytes of an arena of `num_bytes` that only the prefix cache may hold; None for all.

    A CPU's memory is other programs' too: pages are taken from it as they are used.
    """
    if config.prefix_cache_memory_bytes is not None or is_gpu:
        return config.prefix_cache_memory_bytes
    return num_bytes // 8


def activation_bytes(config: EngineConfig, model: ModelConfig, value_bytes: int) -> int:
    """Memory that the largest step takes beside weights and pages: an upper estimate.

    Of what one layer computes for all tokens of a step, as if nothing were freed in between; of
    the parts in which global layers decode; of the logits and the sampler's copies of them for all
    sequences; and of libraries' workspaces.
    """
    attention = max(
        (2 * shape.num_heads + 4 * shape.num_kv_heads) * shape.head_dim
        for shape in (model.local, model.global_)
    )
    feed_forward = 3 * max(layer.intermediate_size for layer in model.layers)
    residuals = 8 * model.hidden_size
    per_layer = 3 * len(model.layers) * model.per_layer_input_size
    routed = 0
    if model.moe is not None:
        routed = model.moe.top_k * (model.hidden_size + model.moe.intermediate_size)
    per_token = (attention + feed_forward + residuals + per_layer + routed) * value_bytes
    per_row = model.vocab_size * (value_bytes + LOGITS_COPIES * FLOAT32_BYTES)
    logits = max(config.max_num_seqs, PROMPT_ROWS) * per_row
    shape = model.global_
    turned = 2 * shape.rotary.num_frequencies if shape.key_is_value else 0
    group = shape.num_heads // shape.num_kv_heads
    rule = Splits.of(group, shape.num_kv_heads, shape.head_dim, turned, None, 1)
    splits = rule.most(model.max_position_embeddings)
    per_sequence = splits * shape.num_heads * (shape.head_dim + 1) * FLOAT32_BYTES
    sequences = config.max_num_seqs * per_sequence
    return config.max_num_batched_tokens * per_token + sequences + logits + WORKSPACE_BYTES


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


def num_sequences(layout: KVLayout, lengths: Sequence[int], num_bytes: int) -> int:
    """How many sequences can grow at once to these lengths, which occur equally often.

    Pages of one kind share sectors, whosever they are. Of one length it is exact: a pool that was
    empty lends the pages of so many sequences, and not those of one more.
    """
    peaks = sum((layout.peak_pages(length) for length in lengths), PageCount(0, 0))
    num_sectors = num_bytes // layout.sector_bytes
    low, high = 0, num_sectors * layout.sector_bytes * len(lengths) // layout.num_bytes(peaks)
    while low < high:
        middle = (low + high + 1) // 2
        local = math.ceil(peaks.local * middle / len(lengths))
        global_ = math.ceil(peaks.global_ * middle / len(lengths))
        if layout.num_sectors(PageCount(local, global_)) <= num_sectors:
            low = middle
        else:
            high = middle - 1
    return low


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


def _available_cpu_bytes() -> int:
    """Memory the system could give out now, within the limit of a container."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # its figure counts what caches would give up
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    return min(available, _container_bytes(Path("/sys/fs/cgroup"), available))


def _container_bytes(cgroup: Path, unlimited: int) -> int:
    """What a container's limit (cgroup v2) leaves, file caches counted as free."""
    limit_file = cgroup / "memory.max"
    if not limit_file.exists() or not (limit := limit_file.read_text().strip()).isdigit():
        return unlimited
    used = int((cgroup / "memory.current").read_text())
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
