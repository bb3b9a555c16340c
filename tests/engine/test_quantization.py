"""Which format each parameter gets, for published shapes and for what GGUF files store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.decoder import Decoder
from bezel.engine.models.registry import build_model
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.quantization import choose_formats, stored_in_bfloat16, stored_types
from bezel.kernels.packed import WeightFormat

INT8, INT4 = WeightFormat.INT8, WeightFormat.INT4
QKV = "layers.0.self_attn.qkv_proj.weight"
Q, K, V = (f"layers.0.self_attn.{name}_proj.weight" for name in "qkv")


def decoder(name: str, **changes: Any) -> Decoder:
    config = ModelConfig.from_hf(PUBLISHED[name] | changes)
    return build_model(config, torch.bfloat16, torch.device("meta"))


SMALL = decoder("gemma-3-270m")


def formats(
    model: Decoder = SMALL,
    quantization: str = "auto",
    dtype: str = "auto",
    is_gpu: bool = False,
    **stored: Kind | tuple[Kind, ...],
) -> dict[str, WeightFormat]:
    config = EngineConfig(quantization=quantization, dtype=dtype)
    types = {
        name: kinds if isinstance(kinds, tuple) else (kinds,) for name, kinds in stored.items()
    }
    return choose_formats(config, model, is_gpu, types)


def test_int8_is_for_all_matrices() -> None:
    found = formats(quantization="int8")
    assert set(found.values()) == {INT8}
    assert {name for name in found if not name.startswith("layers.")} == {"embed_tokens.weight"}
    assert {name for name in found if name.startswith("layers.17.")} == {
        f"layers.17.{name}.weight"
        for name in (
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        )
    }


def test_int4_leaves_tables_and_head_int8() -> None:
    found = formats(decoder("gemma-4-E2B", tie_word_embeddings=False), "int4")
    assert {name for name, format in found.items() if format is INT8} == {
        "embed_tokens.weight",
        "embed_tokens_per_layer.weight",
        "lm_head.weight",
    }
    assert found["per_layer_model_projection.weight"] is INT4
    assert found["layers.34.per_layer_input_gate.weight"] is INT4


def test_experts_are_packed_and_their_router_is_not() -> None:
    found = formats(decoder("gemma-4-26B-A4B"), "int4")
    assert found["layers.0.experts.gate_up_proj"] is found["layers.0.experts.down_proj"] is INT4
    assert not any("router" in name or "norm" in name for name in found)


@pytest.mark.parametrize("choice", ["int4", "int8"])
def test_rows_that_are_not_whole_groups_stay_plain(choice: str) -> None:
    found = formats(decoder("gemma-3-270m", intermediate_size=2064), choice)  # 16 · 129
    assert "layers.0.mlp.down_proj.weight" not in found
    assert "layers.0.mlp.gate_up_proj.weight" in found


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *((kind, INT4) for kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q2_K, Kind.Q3_K)),
        *((kind, INT8) for kind in (Kind.Q5_0, Kind.Q5_1, Kind.Q5_K, Kind.Q6_K, Kind.Q8_0)),
        (Kind.IQ4_NL, INT8),
        *((kind, None) for kind in (Kind.F16, Kind.BF16, Kind.F32)),
    ],
)
def test_the_nearest_format(kind: Kind, expected: WeightFormat | None) -> None:
    name = "layers.3.self_attn.o_proj.weight"
    assert formats(**{name: kind}) == ({} if expected is None else {name: expected})


def test_a_fused_parameter_is_as_precise_as_its_best_part() -> None:
    assert formats(**{Q: Kind.Q4_K, K: Kind.Q4_K, V: Kind.Q4_K}) == {QKV: INT4}
    assert formats(**{Q: Kind.Q4_K, K: Kind.Q4_K, V: Kind.Q6_K}) == {QKV: INT8}
    assert formats(**{Q: Kind.Q8_0, K: Kind.F16, V: Kind.Q4_K}) == {}
    gate, up = "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"
    assert formats(**{gate: Kind.Q6_K, up: Kind.Q4_0}) == {"layers.0.mlp.gate_up_proj.weight": INT8}
    experts = "layers.0.experts.gate_up_proj"
    found = formats(decoder("gemma-4-26B-A4B"), **{experts: (Kind.Q4_K, Kind.Q5_K)})
    assert found == {experts: INT8}


def test_tensors_that_are_not_loaded_have_no_say() -> None:
    """Layer 34 of E2B shares another's keys and values; a tied head is the embeddings."""
    q, k = (f"layers.34.self_attn.{name}_proj.weight" for name in "qk")
    stored = {q: Kind.Q4_0, k: Kind.Q8_0, "embed_tokens.weight": Kind.Q4_0}
    found = formats(decoder("gemma-4-E2B"), **stored, **{"lm_head.weight": Kind.Q8_0})
    assert found == {"layers.34.self_attn.qkv_proj.weight": INT4, "embed_tokens.weight": INT4}


def test_norms_and_router_stay_whatever_the_file_says() -> None:
    stored = {"layers.0.router.proj.weight": Kind.Q8_0, "norm.weight": Kind.Q8_0}
    assert formats(decoder("gemma-4-26B-A4B"), **stored) == {}


def test_who_asks_for_a_dtype_or_for_none_gets_it() -> None:
    stored = {"embed_tokens.weight": Kind.Q8_0}
    assert formats(**stored) == {"embed_tokens.weight": INT8}
    assert formats(dtype="bfloat16", **stored) == {}
    assert formats(quantization="none", **stored) == {}
    assert formats(is_gpu=True, **stored) == {}
    assert formats() == {}  # safetensors
    assert formats(quantization="int8", dtype="float32")["embed_tokens.weight"] is INT8


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_gpu_has_no_kernels_for_them(quantization: str) -> None:
    with pytest.raises(ConfigError, match=f"--quantization {quantization} runs on CPUs only"):
        formats(quantization=quantization, is_gpu=True)


def test_the_types_a_file_stores(write_gguf: Callable[..., Path]) -> None:
    shape = (2, 4, 32)
    tensors = {
        "token_embd.weight": np.zeros((4, 32), np.float32),
        "blk.1.attn_q.weight": np.zeros((4, 32), np.float32),
        "blk.1.ffn_up_exps.weight": np.zeros(shape, np.float32),
        "blk.1.ffn_gate_exps.weight": np.zeros(shape, np.float32),
    }
    kinds = {
        "token_embd.weight": Kind.Q8_0,
        "blk.1.ffn_up_exps.weight": Kind.Q4_0,
        "blk.1.ffn_gate_exps.weight": Kind.Q5_0,
    }
    path = write_gguf("gemma4", {}, tensors, kinds)
    assert stored_types(Checkpoint(path, "gguf", "x", {}, {})) == {
        "embed_tokens.weight": (Kind.Q8_0,),
        "layers.1.self_attn.q_proj.weight": (Kind.F32,),
        "layers.1.experts.gate_up_proj": (Kind.Q5_0, Kind.Q4_0),
    }


def test_the_types_a_directory_stores(tmp_path: Path) -> None:
    tensors = {
        "model.language_model.layers.0.self_attn.q_proj.weight": torch.zeros(2, dtype=torch.half),
        "model.norm.weight": torch.zeros(2, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_types(Checkpoint(tmp_path, "safetensors", "x", {}, {})) == {
        Q: (Kind.F16,),
        "norm.weight": (Kind.BF16,),
        "lm_head.weight": (Kind.F32,),
    }


def test_what_is_stored_in_bfloat16_stays_so() -> None:
    model = decoder("gemma-3-270m", intermediate_size=2056)  # of 16 as much as of nothing
    gate, up, down = (f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    stored = {Q: (Kind.BF16,), K: (Kind.BF16,), V: (Kind.BF16,), gate: (Kind.BF16,)}
    stored |= {up: (Kind.F16,), down: (Kind.BF16,), "norm.weight": (Kind.BF16,)}
    # Half of gate_up_proj would lose bits, and down_proj has rows that don't fit.
    assert stored_in_bfloat16(model, stored) == {QKV: WeightFormat.BFLOAT16}
