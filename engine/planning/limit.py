"""What is in the way first when more is asked for, and which flag moves it."""

from collections.abc import Sequence
from dataclasses import dataclass

from bezel.engine.config import EngineConfig
from bezel.engine.planning.capacity import ContextPlan, MemoryPlan, WorkloadPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """`name` is "weights", "KV pages", "--max-num-seqs" or "model length"."""

    name: str
    text: str
    moved_by: str


def first_limit(
    config: EngineConfig,
    memory: MemoryPlan,
    longest: int,
    refusal: str,
    positions: int,
    contexts: Sequence[ContextPlan],
    workload: WorkloadPlan | None,
) -> Limit:
    """Whether it starts at all, then whether it serves the model's whole length, then how many
    sequences run at once: of the workload, or of the shortest context in the table."""
    if not memory.fits:
        return _too_small(config, memory)
    if refusal:
        return Limit(name="KV pages", text=refusal, moved_by=_kv_flag(memory))
    wanted = config.max_model_len or positions
    if longest < wanted:
        return Limit(
            name="model length",
            text=f"KV pages hold {longest:,} tokens of one sequence, the model takes {wanted:,}",
            moved_by=_kv_flag(memory),
        )
    if workload is not None:
        num_fit, at_once, stopped_by = (
            workload.num_mixed_fit,
            workload.num_at_once,
            workload.stopped_by,
        )
        what = "sequences of the workload"
    else:
        first = contexts[0]
        num_fit, at_once, stopped_by = first.num_fit, first.num_at_once, first.stopped_by
        what = f"sequences of {first.num_tokens:,} tokens"
    if stopped_by == "--max-num-seqs":
        text = f"{at_once:,} {what} run at once, pages would hold {num_fit:,}"
        return Limit(name=stopped_by, text=text, moved_by="--max-num-seqs")
    text = f"pages hold {at_once:,} {what}, --max-num-seqs allows {config.max_num_seqs:,}"
    return Limit(name="KV pages", text=text, moved_by=_kv_flag(memory))


def _too_small(config: EngineConfig, memory: MemoryPlan) -> Limit:
    needed = memory.usable_bytes + memory.short_bytes
    pages = needed - memory.weight_bytes - memory.activation_bytes
    text = (
        f"{needed / 1e9:,.1f} GB are needed (weights {memory.weight_bytes / 1e9:,.1f}, a step "
        f"{memory.activation_bytes / 1e9:,.1f}, KV pages {pages / 1e9:,.2f}), "
        f"{memory.usable_bytes / 1e9:,.1f} GB may be used: "
        f"{memory.short_bytes / 1e9:,.1f} GB are missing"
    )
    flags = []
    if config.kv_cache_memory_bytes is not None and pages > memory.short_bytes:
        flags.append("--kv-cache-memory-bytes")
    if memory.short_bytes <= memory.activation_bytes / 2:
        flags.append("--max-num-batched-tokens")
    if 0 < memory.short_bytes <= memory.total_bytes - memory.usable_bytes:
        flags.append("--gpu-memory-utilization")
    flags.append("a larger device")
    name = "weights" if memory.weight_bytes > memory.usable_bytes else "memory"
    return Limit(name=name, text=text, moved_by=", ".join(flags))


def _kv_flag(memory: MemoryPlan) -> str:
    if memory.is_gpu:
        return "--gpu-memory-utilization or --kv-cache-memory-bytes"
    return "--kv-cache-memory-bytes"
