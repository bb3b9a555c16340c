"""How large the arena is, and the longest sequence it serves."""

import os
from pathlib import Path

import torch

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.kv_layout import KVLayout
from bezel.engine.logprobs import PROMPT_ROWS
from bezel.engine.model_config import ModelConfig
from bezel.kernels.decode_combine import Splits

FLOAT32_BYTES = 4
LOGITS_COPIES = 3  # softcapped, kept for log-probabilities, and what looking through them takes
WORKSPACE_BYTES = 1 << 30  # cuBLAS, CUDA graphs, what the allocator can't join
CPU_SHARE = 0.25  # of available memory: the arena fills only as it is used, but never shrinks


def arena_bytes(
    config: EngineConfig,
    layout: KVLayout,
    max_positions: int,
    device: torch.device,
    reserved_bytes: int = 0,
) -> int:
    """Bytes for KV pages: the flag, or a share of free memory, but no more than could be used.

    `reserved_bytes` of free memory are left for what steps compute.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    longest = min(config.max_model_len or max_positions, max_positions)
    per_sequence = layout.num_sectors(layout.peak_pages(longest)) * layout.sector_bytes
    free_bytes = max(0, _free_bytes(config, device) - reserved_bytes)
    return min(free_bytes, per_sequence * config.max_num_seqs)


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
    return min(available, _container_bytes(Path("/sys/fs/cgroup"), available))


def _container_bytes(cgroup: Path, unlimited: int) -> int:
    """What a container's limit (cgroup v2) leaves, file caches counted as free."""
    limit_file = cgroup / "memory.max"
    if not limit_file.exists() or not (limit := limit_file.read_text().strip()).isdigit():
        return unlimited
    used = int((cgroup / "memory.current").read_text())
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
