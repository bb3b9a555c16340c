"""Loading: every tensor in its place, and an audit that explains whatever is not."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from bezel.engine.errors import CheckpointError
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.decoder import Decoder
from bezel.engine.models.registry import build_model
from bezel.engine.weights import MAX_LISTED, load_weights, text_name

SHAPE: dict[str, Any] = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
GEMMA4: dict[str, Any] = SHAPE | dict(
    global_head_dim=16, hidden_size_per_layer_input=0, vocab_size_per_layer_input=40
)
CONFIGS: dict[str, Gemma3TextConfig | Gemma4TextConfig] = {
    "plain": Gemma4TextConfig(**GEMMA4),
    "k-eq-v": Gemma4TextConfig(**GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1),
    "per-layer-embeddings": Gemma4TextConfig(
        **(GEMMA4 | dict(hidden_size_per_layer_input=6, num_kv_shared_layers=2))
    ),
    "moe": Gemma4TextConfig(
        **GEMMA4,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=10,
    ),
    "untied": Gemma4TextConfig(**GEMMA4, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(**SHAPE),
}
Tensors = dict[str, Tensor]


def tensors_of(name: str) -> Tensors:
    """What transformers would save, every number random."""
    family = Gemma3ForCausalLM if name == "gemma3" else Gemma4ForCausalLM
    model: PreTrainedModel = family(CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    tied = CONFIGS[name].tie_word_embeddings
    return {
        key: torch.randn(tensor.shape, generator=generator)
        for key, tensor in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }


@pytest.fixture
def empty_model() -> Callable[[str], Decoder]:
    """A model whose parameters are all NaN, so that what isn't filled shows."""

    def build(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
        config = ModelConfig.from_hf(CONFIGS[name].to_dict())
        model = build_model(config, dtype, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        return model

    return build


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_filled(name: str, empty_model: Callable[[str], Decoder]) -> None:
    model = empty_model(name)
    load_weights(model, tensors_of(name).items())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", ["plain", "k-eq-v", "moe", "per-layer-embeddings", "untied"])
def test_names_that_are_not_fused_are_copied(
    name: str, empty_model: Callable[[str], Decoder]
) -> None:
    tensors, model = tensors_of(name), empty_model(name)
    load_weights(model, tensors.items())
    copied = 0
    for parameter_name, parameter in model.named_parameters():
        if "qkv_proj" in parameter_name or "gate_up_proj.weight" in parameter_name:
            continue
        key = parameter_name if parameter_name == "lm_head.weight" else f"model.{parameter_name}"
        assert torch.equal(parameter, tensors[key]), parameter_name
        copied += 1
    assert copied >= 4 * 9 + 2


def test_rows_of_fused_projections(empty_model: Callable[[str], Decoder]) -> None:
    """Local layers: 4 query heads of 8 and 2 + 2 of keys and values; global ones: heads of 16."""
    tensors, model = tensors_of("plain"), empty_model("plain")
    load_weights(model, tensors.items())
    for i, head_dim in enumerate((8, 16, 8, 16)):
        prefix = f"model.layers.{i}"
        qkv = model.get_parameter(f"layers.{i}.self_attn.qkv_proj.weight")
        q, kv = 4 * head_dim, 2 * head_dim
        assert len(qkv) == q + 2 * kv
        assert torch.equal(qkv[:q], tensors[f"{prefix}.self_attn.q_proj.weight"])
        assert torch.equal(qkv[q : q + kv], tensors[f"{prefix}.self_attn.k_proj.weight"])
        assert torch.equal(qkv[q + kv :], tensors[f"{prefix}.self_attn.v_proj.weight"])
        gate_up = model.get_parameter(f"layers.{i}.mlp.gate_up_proj.weight")
        assert torch.equal(gate_up[:24], tensors[f"{prefix}.mlp.gate_proj.weight"])
        assert torch.equal(gate_up[24:], tensors[f"{prefix}.mlp.up_proj.weight"])


def test_global_layers_with_keys_as_values_have_no_value_rows(
    empty_model: Callable[[str], Decoder],
) -> None:
    tensors, model = tensors_of("k-eq-v"), empty_model("k-eq-v")
    load_weights(model, tensors.items())
    qkv = model.get_parameter("layers.1.self_attn.qkv_proj.weight")
    expected = [tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qk"]
    assert torch.equal(qkv, torch.cat(expected))


def test_layers_that_share_kv_have_query_rows_only(empty_model: Callable[[str], Decoder]) -> None:
    tensors, model = tensors_of("per-layer-embeddings"), empty_model("per-layer-embeddings")
    load_weights(model, tensors.items())
    for i in (2, 3):
        qkv = model.get_parameter(f"layers.{i}.self_attn.qkv_proj.weight")
        assert torch.equal(qkv, tensors[f"model.layers.{i}.self_attn.q_proj.weight"])


def test_gemma3_norms_are_kept_as_what_they_multiply_by(
    empty_model: Callable[[str], Decoder],
) -> None:
    tensors, model = tensors_of("gemma3"), empty_model("gemma3")
    load_weights(model, tensors.items())
    norms = {name: x for name, x in model.named_parameters() if "norm" in name}
    assert len(norms) == 4 * 6 + 1
    for name, norm in norms.items():
        assert torch.equal(norm, tensors[f"model.{name}"] + 1.0), name
    assert torch.equal(model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_converts_to_the_models_dtype_and_keeps_norms_exact(
    empty_model: Callable[..., Decoder],
) -> None:
    """A bfloat16 checkpoint's w − 1 near zero has more digits than a bfloat16 near one."""
    tensors = {name: x.bfloat16() for name, x in tensors_of("gemma3").items()}
    tensors["model.norm.weight"] = torch.full((16,), 2.0**-10, dtype=torch.bfloat16)
    model = empty_model("gemma3", torch.bfloat16)
    load_weights(model, tensors.items())
    assert model.norm.weight.tolist() == [1 + 2.0**-10] * 16
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    from_float32 = empty_model("plain", torch.bfloat16)
    load_weights(from_float32, tensors_of("plain").items())
    expected = tensors_of("plain")["model.layers.0.self_attn.o_proj.weight"].bfloat16()
    assert torch.equal(from_float32.get_parameter("layers.0.self_attn.o_proj.weight"), expected)


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "language_model.", "model.", ""]
)
def test_prefixes_of_published_checkpoints(
    prefix: str, empty_model: Callable[[str], Decoder]
) -> None:
    tensors = tensors_of("plain")
    renamed = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
    model = empty_model("plain")
    load_weights(model, renamed.items())
    assert torch.equal(model.norm.weight, tensors["model.norm.weight"])
    assert all(text_name(name) == name.removeprefix(prefix) for name in renamed)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_other_modalities_are_reported_and_not_loaded(
    prefix: str, empty_model: Callable[[str], Decoder], caplog: pytest.LogCaptureFixture
) -> None:
    others = {
        "vision_tower.encoder.layers.0.mlp.up_proj.weight": torch.ones(3, 4),
        "vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight": torch.ones(1),
        "audio_tower.layers.0.norm.weight": torch.ones(3),
        "embed_vision.embedding_projection.weight": torch.ones(3),
        "embed_audio.embedding_projection.weight": torch.ones(3),
        "vision_embedder.patch_dense.weight": torch.ones(2),
        "multi_modal_projector.mm_input_projection_weight": torch.ones(2),
    }
    tensors = tensors_of("plain") | {prefix + name: x for name, x in others.items()}
    with caplog.at_level(logging.WARNING, logger="bezel"):
        load_weights(empty_model("plain"), tensors.items())
    assert sorted(record.message for record in caplog.records) == [
        "audio_tower: 1 tensors not loaded, text only so far",
        "embed_audio: 1 tensors not loaded, text only so far",
        "embed_vision: 1 tensors not loaded, text only so far",
        "multi_modal_projector: 1 tensors not loaded, text only so far",
        "vision_embedder: 1 tensors not loaded, text only so far",
        "vision_tower: 2 tensors not loaded, text only so far",
    ]


def test_text_only_checkpoints_report_nothing(
    empty_model: Callable[[str], Decoder], caplog: pytest.LogCaptureFixture
) -> None:
    load_weights(empty_model("plain"), tensors_of("plain").items())
    assert not caplog.records


def test_a_tied_head_may_be_there(empty_model: Callable[[str], Decoder]) -> None:
    tensors = tensors_of("plain")
    for head in ("lm_head.weight", "language_model.lm_head.weight"):
        load_weights(empty_model("plain"), (tensors | {head: torch.zeros(40, 16)}).items())


def test_an_untied_head_must_be_there(empty_model: Callable[[str], Decoder]) -> None:
    tensors = tensors_of("untied")
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: lm_head\.weight$"):
        load_weights(empty_model("untied"), tensors.items())


def test_dead_keys_and_values_of_sharing_layers_may_be_there(
    empty_model: Callable[[str], Decoder],
) -> None:
    tensors = tensors_of("per-layer-embeddings")
    dead = {
        f"model.layers.{i}.self_attn.{part}.weight": torch.ones(1)
        for i in (2, 3)
        for part in ("k_proj", "v_proj", "k_norm")
    }
    assert not tensors.keys() & dead.keys()
    load_weights(empty_model("per-layer-embeddings"), (tensors | dead).items())


def problem(model: Decoder, tensors: Tensors) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_weights(model, tensors.items())
    return raised.value.message


@pytest.mark.parametrize(
    ("removed", "missing"),
    [
        ("norm.weight", "norm.weight"),
        ("layers.2.layer_scalar", "layers.2.layer_scalar"),
        ("layers.0.self_attn.k_proj.weight", "layers.0.self_attn.qkv_proj.weight"),
        ("layers.1.mlp.up_proj.weight", "layers.1.mlp.gate_up_proj.weight"),
    ],
)
def test_a_missing_tensor_is_listed(
    removed: str, missing: str, empty_model: Callable[[str], Decoder]
) -> None:
    tensors = tensors_of("plain")
    del tensors[f"model.{removed}"]
    assert problem(empty_model("plain"), tensors) == (
        f"the checkpoint doesn't fit the model; tensors not in the checkpoint: {missing}"
    )


@pytest.mark.parametrize(
    "name",
    [
        "extra.weight",
        "layers.4.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.bias",
        "layers.0.router.proj.weight",
        "layers.0.self_attn.k_proj.weight_packed",
    ],
)
def test_an_unknown_tensor_is_listed(name: str, empty_model: Callable[[str], Decoder]) -> None:
    tensors = tensors_of("plain") | {f"model.{name}": torch.ones(1)}
    assert problem(empty_model("plain"), tensors) == (
        f"the checkpoint doesn't fit the model; tensors not known to the model: {name}"
    )


def test_a_value_projection_where_keys_are_values_is_unknown(
    empty_model: Callable[[str], Decoder],
) -> None:
    name = "layers.1.self_attn.v_proj.weight"
    tensors = tensors_of("k-eq-v") | {f"model.{name}": torch.ones(16, 16)}
    assert problem(empty_model("k-eq-v"), tensors).endswith(f"not known to the model: {name}")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("norm.weight", (17,), (16,)),
        ("layers.0.self_attn.v_proj.weight", (24, 16), (16, 16)),
        ("layers.3.mlp.down_proj.weight", (24, 16), (16, 24)),
        ("layers.1.layer_scalar", (), (1,)),
    ],
)
def test_a_tensor_of_another_shape_is_listed_with_both(
    name: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    empty_model: Callable[[str], Decoder],
) -> None:
    tensors = tensors_of("plain") | {f"model.{name}": torch.ones(shape)}
    assert problem(empty_model("plain"), tensors) == (
        "the checkpoint doesn't fit the model; tensors of another shape: "
        f"{name} {shape}, expected {expected}"
    )


def test_all_that_is_wrong_is_said_at_once_and_long_lists_are_cut(
    empty_model: Callable[[str], Decoder],
) -> None:
    tensors = tensors_of("plain")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.layer_scalar"] = torch.ones(2)
    tensors |= {f"model.odd.{i}": torch.ones(1) for i in range(MAX_LISTED + 3)}
    missing, unknown, misshapen = problem(empty_model("plain"), tensors).split("; ")[1:]
    assert missing.endswith("not in the checkpoint: norm.weight")
    assert unknown.count("odd.") == MAX_LISTED
    assert unknown.endswith("and 3 more")
    assert misshapen == "of another shape: layers.0.layer_scalar (2,), expected (1,)"
