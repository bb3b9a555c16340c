"""Plans for the machine at hand: of a model that would be served on it, and of one that is."""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from bezel.engine.config import EngineConfig
from bezel.engine.memory import DeviceMemory
from bezel.engine.model_runner import choose_device, choose_dtype
from bezel.engine.planning.capacity import MemoryPlan
from bezel.engine.planning.device import PRESETS, Device
from bezel.engine.planning.model import DTypeName, PlannedModel
from bezel.engine.planning.plan import Plan, make_plan, plan_for
from bezel.engine.planning.source import format_choice, resolve_config
from bezel.kernels.packed import PackedWeight, WeightFormat

if TYPE_CHECKING:
    from bezel.engine.core import Engine

# As torch calls the devices whose speed is known.
_GPUS = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200"}


def dtype_name(choice: str, is_gpu: bool) -> DTypeName:
    """What `--dtype` comes to on a GPU, or on the CPU at hand."""
    dtype = choose_dtype(choice, torch.device("cuda" if is_gpu else "cpu"))
    return cast(DTypeName, str(dtype).removeprefix("torch."))


def plan_to_serve(config: EngineConfig) -> Plan:
    """With these settings on this machine, as its memory is now; of the model only config.json is
    read.

    Raises:
        BezelError: no such model or device, or a length that the model hasn't.
    """
    device = choose_device(config.device)
    is_gpu = device.type == "cuda"
    name, shape = resolve_config(config.model, use_published=False)
    model = PlannedModel.of(
        name,
        shape,
        dtype_name(config.dtype, is_gpu),
        block_size=config.local_page_size(is_gpu),
        choose=format_choice(config, is_gpu),
    )
    return plan_for(model, config, DeviceMemory.of(device), _speed(device))


def plan_of(engine: "Engine") -> Plan:
    """Of an engine that runs, with its weights and its pool as they are."""
    runner = engine.runner
    is_gpu = runner.device.type == "cuda"
    formats = _formats(runner.model, runner.dtype)
    model = PlannedModel.of(
        engine.checkpoint.name,
        runner.model_config,
        dtype_name(str(runner.dtype).removeprefix("torch."), is_gpu),
        block_size=runner.layout.local_page_size,
        choose=lambda _: formats,
    )
    memory = MemoryPlan.of_pool(model, engine.pool, DeviceMemory.of(runner.device))
    return make_plan(model, engine.config, memory, _speed(runner.device))


def _formats(model: nn.Module, dtype: torch.dtype) -> dict[str, WeightFormat]:
    """Of weights that are kept in another format than the model's dtype."""
    return {
        f"{path}.{leaf}": weight.format
        for path, module in model.named_modules()
        for leaf, weight in vars(module).items()
        if isinstance(weight, PackedWeight) and weight.format != str(dtype).removeprefix("torch.")
    }


def _speed(device: torch.device) -> Device | None:
    if device.type != "cuda":
        return None
    preset = _GPUS.get(torch.cuda.get_device_name(device))
    return None if preset is None else PRESETS[preset]
