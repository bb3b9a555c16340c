"""Resolving and reading checkpoints, and the one line said when that doesn't work."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bezel.engine.checkpoint import (
    iterate_tensors,
    num_tensors,
    read_json,
    resolve_checkpoint,
)
from bezel.engine.errors import CheckpointError
from bezel.engine.model_config import ModelConfig

WriteGGUF = Callable[..., Path]
CONFIG = {"model_type": "gemma3_text", "hidden_size": 64}
SHARDS = {
    "model-1.safetensors": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()},
    "model-2.safetensors": {"c": torch.tensor([7], dtype=torch.int32)},
}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-gemma"
    directory.mkdir()
    write_json(directory / "config.json", CONFIG)
    for name, tensors in SHARDS.items():
        save_file(tensors, directory / name)
    return directory


@pytest.fixture
def indexed(directory: Path) -> Path:
    weight_map = {tensor: shard for shard, tensors in SHARDS.items() for tensor in tensors}
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    save_file({"stray": torch.ones(1)}, directory / "unlisted.safetensors")
    return directory


@pytest.fixture
def gguf_path(write_gguf: WriteGGUF) -> Path:
    metadata = {
        "gemma3.context_length": 512,
        "gemma3.embedding_length": 32,
        "gemma3.block_count": 6,
        "gemma3.feed_forward_length": 64,
        "gemma3.attention.head_count": 2,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 16,
        "gemma3.attention.sliding_window": 8,
        "tokenizer.ggml.tokens": ["<eos>", "<end_of_turn>"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    tensors = {f"blk.{i}.attn_norm.weight": np.full(32, 3.0, np.float32) for i in range(6)}
    tensors["token_embd.weight"] = np.ones((2, 32), np.float32)
    return write_gguf("gemma3", metadata, tensors, name="My-Gemma.Q8_0.gguf")


def assert_fails(model: Path | str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        resolve_checkpoint(str(model))
    assert "\n" not in caught.value.message


def test_a_directory(directory: Path) -> None:
    write_json(directory / "generation_config.json", {"eos_token_id": [1, 106]})
    checkpoint = resolve_checkpoint(str(directory))
    assert (checkpoint.format, checkpoint.name) == ("safetensors", "tiny-gemma")
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {"eos_token_id": [1, 106]}
    read = dict(iterate_tensors(checkpoint))
    assert list(read) == ["a", "b", "c"]
    for tensors in SHARDS.values():
        for name, expected in tensors.items():
            assert read[name].dtype == expected.dtype
            assert torch.equal(read[name], expected)
    assert num_tensors(checkpoint) == 3


def test_the_index_says_which_files_count(indexed: Path) -> None:
    checkpoint = resolve_checkpoint(str(indexed))
    assert [name for name, _ in iterate_tensors(checkpoint)] == ["a", "b", "c"]
    assert num_tensors(checkpoint) == 3


def test_a_gguf_file(gguf_path: Path) -> None:
    checkpoint = resolve_checkpoint(str(gguf_path))
    assert (checkpoint.format, checkpoint.name) == ("gguf", "My-Gemma.Q8_0")
    assert checkpoint.generation_config == {"eos_token_id": [0, 1]}
    model_config = ModelConfig.from_hf(checkpoint.config)
    assert model_config.local.window == 8
    assert [layer.is_local for layer in model_config.layers] == [True] * 5 + [False]
    read = dict(iterate_tensors(checkpoint))
    assert read["model.layers.5.input_layernorm.weight"].tolist() == [2.0] * 32
    assert num_tensors(checkpoint) == len(read) == 7


def test_what_is_not_there(tmp_path: Path) -> None:
    assert_fails(tmp_path / "absent", "no such directory or file")
    assert_fails("./org/name", "no such directory or file")
    assert_fails(tmp_path / "absent.gguf", "can't be read: No such file")
    (tmp_path / "model.bin").write_bytes(b"x")
    assert_fails(tmp_path / "model.bin", r"neither a directory nor a \.gguf file")


def test_directories_that_cannot_be_served(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    assert_fails(directory, r"config\.json can't be read")
    (directory / "config.json").write_text("[]")
    assert_fails(directory, r"config\.json doesn't hold a JSON object")
    write_json(directory / "config.json", {"model_type": "llama"})
    assert_fails(directory, "of type 'llama'; Bezel serves gemma3_text, gemma3, gemma4_text, ")
    quantised = CONFIG | {"quantization_config": {"quant_method": "compressed-tensors"}}
    write_json(directory / "config.json", quantised)
    assert_fails(directory, r"is quantised \(compressed-tensors\)")
    (directory / "config.json").unlink()
    assert_fails(directory, r"has no config\.json$")
    (directory / "model.gguf").write_bytes(b"GGUF")
    assert_fails(directory, r"has no config\.json; name the \.gguf file itself")


def test_directories_without_safetensors(directory: Path) -> None:
    for name in SHARDS:
        (directory / name).unlink()
    assert_fails(directory, r"has no \.safetensors files$")
    (directory / "pytorch_model.bin").write_bytes(b"x")
    assert_fails(directory, r"pickled weights such as pytorch_model\.bin aren't loaded")


def test_an_index_that_does_not_fit(indexed: Path) -> None:
    save_file({"b": torch.ones(2)}, indexed / "model-1.safetensors")
    assert_fails(indexed, r"model-1\.safetensors lacks a, which the index says it holds")
    (indexed / "model-2.safetensors").unlink()
    (indexed / "model-1.safetensors").unlink()
    assert_fails(indexed, r"lacks model-1\.safetensors, which its index names")
    write_json(indexed / "model.safetensors.index.json", {"weight_map": {}})
    assert_fails(indexed, "has no weight_map")


@pytest.mark.parametrize(
    "name",
    ["../secret/model.safetensors", "{outside}", "sub/model.safetensors", "..", ".", "", 3, None],
)
def test_an_index_names_only_files_beside_it(indexed: Path, tmp_path: Path, name: Any) -> None:
    outside = indexed.parent / "secret" / "model.safetensors"
    for path in (outside, indexed / "sub" / "model.safetensors"):
        path.parent.mkdir()
        save_file({"a": torch.ones(2)}, path)
    if name == "{outside}":
        name = str(outside)
    write_json(indexed / "model.safetensors.index.json", {"weight_map": {"a": name}})
    assert_fails(indexed, re.escape(f"names {name!r}, which isn't a .safetensors file beside it"))


def test_files_may_be_links_as_in_the_cache_of_the_hub(indexed: Path) -> None:
    blobs = indexed.parent / "blobs"
    blobs.mkdir()
    for i, name in enumerate(SHARDS):
        (indexed / name).rename(blobs / str(i))
        (indexed / name).symlink_to(blobs / str(i))
    checkpoint = resolve_checkpoint(str(indexed))
    assert {name for name, _ in iterate_tensors(checkpoint)} == {
        n for t in SHARDS.values() for n in t
    }


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\xff" * 64])
def test_damaged_safetensors(indexed: Path, damage: Callable[[bytes], bytes]) -> None:
    shard = indexed / "model-2.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    assert_fails(indexed, r"model-2\.safetensors can't be read")


def test_damage_without_an_index_is_found_when_reading(directory: Path) -> None:
    checkpoint = resolve_checkpoint(str(directory))
    (directory / "model-2.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors can't be read"):
        list(iterate_tensors(checkpoint))


def test_gguf_files_that_cannot_be_served(gguf_path: Path, write_gguf: WriteGGUF) -> None:
    other = write_gguf("llama", {}, {"a": np.ones(32, np.float32)}, name="llama.gguf")
    assert_fails(other, r"llama\.gguf: the GGUF holds a model of architecture 'llama'")
    gguf_path.write_bytes(gguf_path.read_bytes()[:-64])
    assert_fails(gguf_path, r"My-Gemma\.Q8_0\.gguf is truncated: tensor token_embd\.weight ends")
    gguf_path.write_bytes(b"<!DOCTYPE html>")
    assert_fails(gguf_path, "is not a GGUF file")


def test_the_default_model_has_a_name(gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bezel.engine.checkpoint.default_model_path", lambda root: gguf_path)
    checkpoint = resolve_checkpoint("default", cache_root=gguf_path.parent)
    assert (checkpoint.name, checkpoint.path) == ("gemma-3-270m", gguf_path)
    assert checkpoint.cache_root == gguf_path.parent


def test_read_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json can't be read"):
        read_json(tmp_path / "absent.json")
