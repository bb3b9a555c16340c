"""What is simulated: a model on a device, with the memory that its pages get there."""

from dataclasses import dataclass, replace
from typing import cast

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.memory import DeviceMemory, arena_bytes, max_model_len, prefix_cache_bytes
from bezel.engine.planning.device import Device
from bezel.engine.planning.model import DTypeName, PlannedModel
from bezel.engine.planning.source import format_choice, resolve_config


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine as it would start on the device, alone on it."""

    model: PlannedModel
    device: Device
    config: EngineConfig
    arena_bytes: int
    max_model_len: int

    @classmethod
    def of(cls, config: EngineConfig, device: Device) -> "Setup":
        """Of `config.model`, of which no more than config.json is needed.

        Raises:
            ConfigError: there is no such model, or it doesn't fit.
        """
        name, shape = resolve_config(config.model)
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        model = PlannedModel.of(
            name,
            shape,
            cast(DTypeName, dtype),
            block_size=config.local_page_size(device.is_gpu),
            choose=format_choice(config, device.is_gpu),
        )
        memory = DeviceMemory(device.is_gpu, device.memory_bytes, device.memory_bytes)
        memory = memory.with_weights(model.weight_bytes)
        num_bytes = arena_bytes(config, model.config, model.layout, model.value_bytes, memory)
        if num_bytes > memory.free_bytes or not memory.free_bytes:
            raise ConfigError(
                f"{device.memory_bytes:,} bytes of device memory don't hold weights of "
                f"{model.weight_bytes:,} and KV pages of {num_bytes:,}"
            )
        cache_bytes = prefix_cache_bytes(config, device.is_gpu, num_bytes)
        config = replace(config, prefix_cache_memory_bytes=cache_bytes)
        positions = model.config.max_position_embeddings
        longest = max_model_len(config, model.layout, positions, num_bytes)
        return cls(model, device, config, num_bytes, longest)
