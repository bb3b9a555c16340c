"""Plans of this machine: before a model is served on it, and of the engine that serves it."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from bezel.engine import memory
from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.memory import DeviceMemory, arena_bytes, max_model_len
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import build_model
from bezel.engine.page_pool import PagePool
from bezel.engine.planning import machine
from bezel.engine.planning.machine import plan_of, plan_to_serve
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.planning.report import gist
from bezel.engine.quantization import bfloat16_matrices, choose_formats
from bezel.kernels.packed import PackedWeight, WeightFormat

SHAPE = ModelConfig.from_hf(PUBLISHED["gemma-4-E2B"])


def pack(model: nn.Module, name: str, format: WeightFormat) -> None:
    """Put a packed weight, of whatever values, in a parameter's place."""
    module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    delattr(module, leaf)
    setattr(module, leaf, PackedWeight(torch.empty(0), format, 0, 0))


@pytest.fixture(autouse=True)
def no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "resolve_config", lambda model, use_published: (model, SHAPE))


def test_the_memory_there_is_now_less_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available_cpu_bytes", lambda: 20 * 10**9)
    found = plan_to_serve(EngineConfig(model="x", device="cpu", dtype="bfloat16"))
    assert found.memory.kv_bytes == (20 * 10**9 - found.memory.weight_bytes) // 4
    assert found.device is None and found.decoding == ()
    assert found.model == "x" and found.dtype == "bfloat16"


def test_a_gpu_that_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    config = EngineConfig(model="x", gpu_memory_utilization=0.5)
    found = plan_to_serve(config)
    assert found.memory.usable_bytes == 30 * 10**9  # 10 are others', and half of all is left
    assert found.device is not None and found.device.name == "H200 SXM" and found.decoding
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert plan_to_serve(config).device is None


@pytest.mark.parametrize("quantization", ["none", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_running_engine_says_what_its_plan_said(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, quantization: str
) -> None:
    """The arena and the longest sequence as the runner computes them, weights as they are."""
    monkeypatch.setattr(memory, "_available_cpu_bytes", lambda: 20 * 10**9)
    name: Any = str(dtype).removeprefix("torch.")
    config = EngineConfig(
        model="x", device="cpu", dtype=name, max_num_seqs=9, quantization=quantization
    )
    planned = plan_to_serve(config)
    model = build_model(SHAPE, dtype, torch.device("meta"))
    formats = bfloat16_matrices(model) | choose_formats(config, model, False, {})
    for parameter, format in formats.items():
        pack(model, parameter, format)
    layout = machine.PlannedModel.of("x", SHAPE, name, block_size=8).layout
    left = DeviceMemory.of(torch.device("cpu")).with_weights(planned.memory.weight_bytes)
    num_bytes = arena_bytes(config, SHAPE, layout, dtype.itemsize, left)
    runner: Any = SimpleNamespace(
        model=model,
        model_config=SHAPE,
        layout=layout,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    engine: Any = SimpleNamespace(
        config=config,
        runner=runner,
        pool=PagePool(layout, num_bytes),
        checkpoint=SimpleNamespace(name="x"),
    )
    running = plan_of(cast(Engine, engine))
    assert running.contexts == planned.contexts
    assert running.weights == planned.weights
    positions = SHAPE.max_position_embeddings
    assert running.max_model_len == max_model_len(config, layout, positions, num_bytes)
    lines = gist(running)
    assert lines[:2] == gist(planned)[:2] and len(lines) == 5
