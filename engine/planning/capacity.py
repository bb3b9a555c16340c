"""How a device's memory is divided, and how many sequences of which lengths its KV pages hold.

All of it is the allocator's own arithmetic: `memory.py` and `KVLayout`.
"""

from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist

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
from bezel.engine.page_pool import PagePool
from bezel.engine.planning.model import PlannedModel

CONTEXTS = (8192, 32_768, 131_072, 262_144)
MIX_SIZE = 20  # equally likely lengths that stand for a distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes. `usable` of `total` may be taken; `short` is what is missing for weights, a step and
    the pages of two tokens, or for the pages that a flag asks for."""

    is_gpu: bool
    total_bytes: int
    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    short_bytes: int
    sector_bytes: int
    num_sectors: int

    @classmethod
    def of(cls, model: PlannedModel, config: EngineConfig, memory: DeviceMemory) -> "MemoryPlan":
        """As the engine would divide `memory`, in which nothing is loaded yet."""
        layout = model.layout
        kv_bytes = arena_bytes(
            config,
            model.config,
            layout,
            model.value_bytes,
            memory.with_weights(model.weight_bytes),
        )
        reserved = 0
        usable = memory.free_bytes
        if memory.is_gpu:
            reserved = activation_bytes(config, model.config, model.value_bytes)
            usable = memory.usable_bytes(config)
        least = layout.num_sectors(layout.peak_pages(2)) * layout.sector_bytes
        needed = model.weight_bytes + reserved + max(least, config.kv_cache_memory_bytes or 0)
        return cls(
            is_gpu=memory.is_gpu,
            total_bytes=memory.total_bytes,
            usable_bytes=usable,
            weight_bytes=model.weight_bytes,
            activation_bytes=reserved,
            kv_bytes=kv_bytes,
            short_bytes=max(0, needed - usable),
            sector_bytes=layout.sector_bytes,
            num_sectors=kv_bytes // layout.sector_bytes,
        )

    @classmethod
    def of_pool(cls, model: PlannedModel, pool: PagePool, memory: DeviceMemory) -> "MemoryPlan":
        """Of an engine that has its weights and pages already; `memory` is what it left."""
        sector_bytes = model.layout.sector_bytes
        kv_bytes = pool.num_sectors * sector_bytes
        return cls(
            is_gpu=memory.is_gpu,
            total_bytes=memory.total_bytes,
            usable_bytes=model.weight_bytes + kv_bytes,
            weight_bytes=model.weight_bytes,
            activation_bytes=0,
            kv_bytes=kv_bytes,
            short_bytes=0,
            sector_bytes=sector_bytes,
            num_sectors=pool.num_sectors,
        )

    @property
    def fits(self) -> bool:
        return self.short_bytes == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPlan:
    """Sequences of `num_tokens`. `full_length_bytes` is one's in a cache that keeps K and V of
    every token in every layer; `num_fit` can grow so long at once, `num_at_once` of them run."""

    num_tokens: int
    bytes_per_sequence: int
    full_length_bytes: int
    window_bytes: int
    global_bytes: int
    num_fit: int
    num_at_once: int
    stopped_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Tokens of prompt plus output: of the median request, and of one longer than 95 %."""

    p50: int
    p95: int

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not 0 < self.p50 <= self.p95:
            raise ConfigError(
                f"--workload: the 95th percentile ({self.p95} tokens) can't be below the median "
                f"({self.p50}), nor that below 1"
            )

    def lengths(self, limit: int) -> list[int]:
        """Equally likely ones of the lognormal distribution through both points, up to `limit`."""
        normal = NormalDist()
        spread = log(self.p95 / self.p50) / normal.inv_cdf(0.95)
        chances = ((i + 0.5) / MIX_SIZE for i in range(MIX_SIZE))
        lengths = (round(self.p50 * exp(spread * normal.inv_cdf(chance))) for chance in chances)
        return [min(max(1, length), limit) for length in lengths]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadPlan:
    """How many fit if all are as long as the median, as the 95th percentile, and mixed; and how
    many of the mix run at once."""

    p50_tokens: int
    p95_tokens: int
    num_p50_fit: int
    num_p95_fit: int
    num_mixed_fit: int
    num_at_once: int
    stopped_by: str


def longest_sequence(
    config: EngineConfig, layout: KVLayout, positions: int, kv_bytes: int
) -> tuple[int, str]:
    """What `max_model_len` will be; 0 and the reason if the engine would refuse to start.

    Raises:
        ConfigError: the flag asks for what the model hasn't.
    """
    enough = layout.num_sectors(layout.peak_pages(positions)) * layout.sector_bytes
    max_model_len(config, layout, positions, enough)
    try:
        return max_model_len(config, layout, positions, kv_bytes), ""
    except ConfigError as error:
        return 0, error.message


def plan_contexts(
    model: PlannedModel, config: EngineConfig, memory: MemoryPlan
) -> tuple[ContextPlan, ...]:
    """At each of `CONTEXTS` that the model and --max-model-len allow, and at the longest."""
    longest = min(config.max_model_len or 1 << 62, model.config.max_position_embeddings)
    lengths = [n for n in CONTEXTS if n < longest]
    if len(lengths) < len(CONTEXTS):
        lengths.append(longest)
    return tuple(_plan_context(model, config, memory, n) for n in lengths)


def _plan_context(
    model: PlannedModel, config: EngineConfig, memory: MemoryPlan, num_tokens: int
) -> ContextPlan:
    layout = model.layout
    num_fit = num_sequences(layout, [num_tokens], memory.kv_bytes) if memory.fits else 0
    num_at_once, stopped_by = at_once(num_fit, config, memory)
    pages = layout.peak_pages(num_tokens)
    return ContextPlan(
        num_tokens=num_tokens,
        bytes_per_sequence=layout.num_bytes(pages),
        full_length_bytes=num_tokens * model.full_length_bytes_per_token,
        window_bytes=len(layout.local_page_range(num_tokens)) * layout.local_page_bytes,
        global_bytes=pages.global_ * layout.global_page_bytes,
        num_fit=num_fit,
        num_at_once=num_at_once,
        stopped_by=stopped_by,
    )


def plan_workload(
    model: PlannedModel, config: EngineConfig, memory: MemoryPlan, workload: Workload
) -> WorkloadPlan:
    """Of a mix whose lengths are cut at the model's longest.

    Raises:
        ConfigError: the 95th percentile is longer than the model or --max-model-len allows.
    """
    limit = min(config.max_model_len or 1 << 62, model.config.max_position_embeddings)
    if workload.p95 > limit:
        raise ConfigError(f"--workload: {workload.p95} tokens are more than the longest, {limit}")
    num_p50, num_p95, num_mixed = (
        num_sequences(model.layout, lengths, memory.kv_bytes) if memory.fits else 0
        for lengths in ([workload.p50], [workload.p95], workload.lengths(limit))
    )
    num_at_once, stopped_by = at_once(num_mixed, config, memory)
    return WorkloadPlan(
        p50_tokens=workload.p50,
        p95_tokens=workload.p95,
        num_p50_fit=num_p50,
        num_p95_fit=num_p95,
        num_mixed_fit=num_mixed,
        num_at_once=num_at_once,
        stopped_by=stopped_by,
    )


def at_once(num_fit: int, config: EngineConfig, memory: MemoryPlan) -> tuple[int, str]:
    """How many of those that fit run together, and what keeps others out."""
    if not memory.fits:
        return 0, "memory"
    if num_fit < config.max_num_seqs:
        return num_fit, "KV pages"
    return config.max_num_seqs, "--max-num-seqs"
