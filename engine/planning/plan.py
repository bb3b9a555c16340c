"""What a model needs and what a machine makes of it, from config.json alone.

PlannedModel + EngineConfig + memory + device ─▶ Plan ─▶ report.py: table, five lines, JSON
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from bezel.engine.config import EngineConfig
from bezel.engine.memory import DeviceMemory
from bezel.engine.planning.capacity import (
    ContextPlan,
    MemoryPlan,
    Workload,
    WorkloadPlan,
    longest_sequence,
    plan_contexts,
    plan_workload,
)
from bezel.engine.planning.device import Device
from bezel.engine.planning.limit import Limit, first_limit
from bezel.engine.planning.model import PlannedModel
from bezel.engine.planning.step_cost import StepCost
from bezel.engine.planning.steps import DECODE_CONTEXT, StepPlan, plan_decoding, plan_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """All layers of one attention kind. `kv_layers` are those that own keys and values; the others
    read those of the `donors`. Of a token pages keep `values_per_token` numbers for each owner and
    `bytes_per_token` for all."""

    kind: str
    num_layers: int
    kv_layers: tuple[int, ...]
    donors: tuple[int, ...]
    window: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    packs_keys_into_values: bool
    values_per_token: int
    bytes_per_token: int
    page_tokens: int
    page_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All of a plan's numbers; sizes in bytes, lengths in tokens, times in seconds.

    `num_packed` are parameters that aren't kept in `dtype`, by format. `max_model_len` is 0 where
    the engine would refuse to start. `decoding` and `prompts` are empty where the device's speed
    isn't known.
    """

    model: str
    dtype: str
    kv_dtype: str
    num_parameters: int
    num_packed: dict[str, int]
    device: Device | None
    layers: tuple[LayerPlan, ...]
    weights: dict[str, int]
    memory: MemoryPlan
    max_position_embeddings: int
    max_model_len: int
    contexts: tuple[ContextPlan, ...]
    workload: WorkloadPlan | None
    decoding: tuple[StepPlan, ...]
    prompts: tuple[StepPlan, ...]
    first_limit: Limit
    notes: tuple[str, ...]
    is_measured: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        plan: dict[str, Any] = msgspec.to_builtins(self)
        return plan | {"fits": self.memory.fits}


def make_plan(
    model: PlannedModel,
    config: EngineConfig,
    memory: MemoryPlan,
    device: Device | None,
    workload: Workload | None = None,
) -> Plan:
    """Put the numbers together; without a `device` there are no times.

    Raises:
        ConfigError: a length in `config` or `workload` that the model hasn't.
    """
    positions = model.config.max_position_embeddings
    longest, refusal = longest_sequence(config, model.layout, positions, memory.kv_bytes)
    contexts = plan_contexts(model, config, memory)
    mix = None if workload is None else plan_workload(model, config, memory, workload)
    decoding: tuple[StepPlan, ...] = ()
    prompts: tuple[StepPlan, ...] = ()
    if device is not None:
        cost = StepCost(model, device)
        limit = min(config.max_model_len or positions, longest or positions)
        decoding = plan_decoding(cost, min(DECODE_CONTEXT, limit), contexts[0].num_at_once or 1)
        prompts = plan_prompts(cost, config, limit)
    return Plan(
        model=model.name,
        dtype=model.dtype,
        kv_dtype=model.kv_dtype,
        num_parameters=model.num_parameters,
        num_packed=model.num_packed,
        device=device,
        layers=(_layers(model, is_local=True), _layers(model, is_local=False)),
        weights={name: part.num_bytes for name, part in model.weights.items()},
        memory=memory,
        max_position_embeddings=positions,
        max_model_len=longest,
        contexts=contexts,
        workload=mix,
        decoding=decoding,
        prompts=prompts,
        first_limit=first_limit(config, memory, longest, refusal, positions, contexts, mix),
        notes=_notes(model, device),
    )


def plan_for(
    model: PlannedModel,
    config: EngineConfig,
    memory: DeviceMemory,
    device: Device | None,
    workload: Workload | None = None,
) -> Plan:
    """For `memory` in which nothing is loaded yet; raises as `make_plan`."""
    return make_plan(model, config, MemoryPlan.of(model, config, memory), device, workload)


def _layers(model: PlannedModel, is_local: bool) -> LayerPlan:
    config, layout = model.config, model.layout
    layers = [layer for layer in config.layers if layer.is_local == is_local]
    shape = config.attention(layers[0])
    owners = tuple(layer.index for layer in layers if layer.owns_kv)
    return LayerPlan(
        kind="local" if is_local else "global",
        num_layers=len(layers),
        kv_layers=owners,
        donors=tuple(sorted({layer.kv_layer for layer in layers if not layer.owns_kv})),
        window=shape.window,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        packs_keys_into_values=shape.key_is_value,
        values_per_token=shape.kv_values_per_token,
        bytes_per_token=len(owners) * shape.kv_values_per_token * model.kv_value_bytes,
        page_tokens=layout.local_page_size if is_local else layout.global_page_size,
        page_bytes=layout.local_page_bytes if is_local else layout.global_page_bytes,
    )


def _notes(model: PlannedModel, device: Device | None) -> tuple[str, ...]:
    notes = []
    if model.kv_dtype != model.dtype:
        notes.append(
            f"KV pages in {model.kv_dtype} are a what-if: `bezel serve` keeps them in the "
            "model's dtype."
        )
    if device is not None and model.dtype == "float32":
        notes.append("Products are timed as in bfloat16; float32 takes longer.")
    if device is not None and model.num_packed:
        notes.append(
            "Products with packed weights are timed as in bfloat16, but for what they read."
        )
    if device is None:
        notes.append("No step times: the speed of this device isn't known.")
    return tuple(notes)
