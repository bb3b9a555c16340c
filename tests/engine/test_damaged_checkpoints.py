"""Checkpoints with random damage load or are refused: see `tests/damaged_checkpoints.py`."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from damaged_checkpoints import load, run

from bezel.engine.errors import CheckpointError

NUMBERS = {
    "block_count": 2,
    "embedding_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 32,
    "context_length": 512,
    "attention.sliding_window": 16,
    "attention.sliding_window_pattern": 2,
    "feed_forward_length": 64,
}
SHAPES = {
    "attn_norm": (32,),
    "attn_q": (64, 32),
    "attn_k": (32, 32),
    "attn_v": (32, 32),
    "attn_output": (32, 64),
    "attn_q_norm": (32,),
    "attn_k_norm": (32,),
    "post_attention_norm": (32,),
    "ffn_norm": (32,),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
    "post_ffw_norm": (32,),
}


@pytest.fixture
def wholes(tmp_path: Path, small_checkpoint: Path) -> Path:
    """A folder with one checkpoint of each format."""
    folder = tmp_path / "whole"
    shutil.copytree(small_checkpoint, folder / "gemma4")
    write_gemma3_gguf(folder / "gemma3.gguf")
    return folder


def write_gemma3_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "gemma3")
    for key, value in NUMBERS.items():
        writer.add_uint32(f"gemma3.{key}", value)
    writer.add_float32("gemma3.rope.freq_base", 1e6)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(96)])
    shapes = {"token_embd": (96, 32), "output_norm": (32,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        if "attn_q" in name and len(shape) == 2:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_damage_is_refused_or_harmless(wholes: Path) -> None:
    outcomes = run(wholes, 250, seed=0)
    assert min(outcomes["refused"], outcomes["loaded"]) > 50, outcomes


def test_values_of_other_kinds_are_named(wholes: Path) -> None:
    config = wholes / "gemma4" / "config.json"
    text = config.read_text()
    for whole, damage, message in (
        ('"hidden_size": 32', '"hidden_size": "32"', "hidden_size is '32', not a whole number"),
        ('"hidden_size": 32', '"hidden_size": -1', "hidden_size is -1, not a whole number"),
        ('"num_key_value_heads": 1', '"num_key_value_heads": 3', "doesn't divide 2 heads"),
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": false', "rms_norm_eps is False, not a positive"),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 1e9', "num_hidden_layers is 1000000000.0"),
    ):
        assert whole in text
        config.write_text(text.replace(whole, damage))
        with pytest.raises(CheckpointError, match=message):
            load(wholes / "gemma4")
