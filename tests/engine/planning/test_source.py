"""Where the shape of a model comes from, and that nothing but config.json is asked for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bezel.engine.config import EngineConfig
from bezel.engine.errors import CheckpointError
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import build_model
from bezel.engine.planning import source
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.planning.source import format_choice, resolve_config
from bezel.kernels.packed import WeightFormat

CONFIG = PUBLISHED["gemma-4-E2B"]
SHAPE = ModelConfig.from_hf(CONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without weights."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """What was asked of the hub, which answers with the folder's config."""
    asked: list[str] = []

    def download_config(repo_id: str) -> Path:
        asked.append(repo_id)
        return folder / "config.json"

    monkeypatch.setattr(source, "download_config", download_config)
    return asked


def test_a_folder_or_its_config(folder: Path, asked: list[str]) -> None:
    assert resolve_config(str(folder)) == ("mine", SHAPE)
    assert resolve_config(str(folder / "config.json")) == ("mine", SHAPE)
    assert asked == []


def test_a_published_name_needs_no_network(asked: list[str]) -> None:
    assert resolve_config("google/gemma-4-e2b-it") == ("gemma-4-E2B", SHAPE)
    assert asked == []


def test_another_hub_id_and_whatever_would_be_served(asked: list[str]) -> None:
    assert resolve_config("org/own-gemma") == ("org/own-gemma", SHAPE)
    served = resolve_config("google/gemma-4-E2B-it", use_published=False)
    assert served == ("google/gemma-4-E2B-it", SHAPE)
    assert asked == ["org/own-gemma", "google/gemma-4-E2B-it"]


@pytest.mark.weights
def test_the_default_model_by_its_file_header() -> None:
    name, shape = resolve_config("default")
    assert name == "gemma-3-270m"
    expected = ModelConfig.from_hf(PUBLISHED["gemma-3-270m"])
    assert shape.rms_norm_eps == pytest.approx(expected.rms_norm_eps)  # GGUF has it in float32
    assert replace(shape, rms_norm_eps=expected.rms_norm_eps) == expected


@pytest.mark.weights
def test_the_default_model_is_packed_as_its_file_stores_it() -> None:
    """The table in 8 bits; of layer 9 the output and MLP's last product in 4, all else in 5."""
    _, shape = resolve_config("default")
    model = build_model(shape, torch.bfloat16, torch.device("meta"))
    found = format_choice(EngineConfig(), False)(model)
    assert found["embed_tokens.weight"] is WeightFormat.INT8
    assert {name: format.value for name, format in found.items() if ".9." in name} == {
        "layers.9.self_attn.qkv_proj.weight": "int8",
        "layers.9.self_attn.o_proj.weight": "int4",
        "layers.9.mlp.gate_up_proj.weight": "int8",
        "layers.9.mlp.down_proj.weight": "int4",
    }
    assert format_choice(EngineConfig(), True)(model) == {}
    published = format_choice(EngineConfig(model="gemma-4-E2B", quantization="int8"), False)
    assert len(published(model)) == 1 + 4 * 18


def test_in_float32_a_cpu_keeps_what_is_stored_in_bfloat16(folder: Path) -> None:
    def kept(model: str, is_gpu: bool = False) -> set[str]:
        formats = format_choice(EngineConfig(model=model), is_gpu)(of_float32)
        return {format.value for format in formats.values()}

    of_float32 = build_model(SHAPE, torch.float32, torch.device("meta"))
    assert kept("gemma-4-E2B") == kept(str(folder)) == {"bfloat16"}  # as all that are published
    assert kept("gemma-4-E2B", is_gpu=True) == set()
    for dtype, formats in ((torch.float32, set()), (torch.bfloat16, {"bfloat16"})):
        weight = torch.zeros(2, 2, dtype=dtype)
        save_file({"model.embed_tokens.weight": weight}, folder / "model.safetensors")
        assert kept(str(folder)) == formats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not served"),
        ({"quantization_config": {"quant_method": "awq"}}, "mine is quantised"),
    ],
)
def test_what_would_not_be_served(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(CheckpointError, match=message):
        resolve_config(str(folder))


def test_what_is_not_there(tmp_path: Path, asked: list[str]) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=r"has no config.json; name the \.gguf file itself"):
        resolve_config(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"gemma-5: no such .* those are gemma-3-270m, gem"):
        resolve_config("gemma-5")
    assert asked == []
