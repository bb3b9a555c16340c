"""Shapes read from config.json: the five Gemma 4 models, old and new Gemma 3, and refusals."""

import json
from typing import Any

import pytest
from transformers import Gemma3TextConfig, Gemma4TextConfig, Gemma4UnifiedTextConfig

from bezel.engine.errors import CheckpointError
from bezel.engine.model_config import (
    AttentionConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RotaryConfig,
)

LOCAL_ROPE, GLOBAL_ROPE = RotaryConfig(1e4, 128), RotaryConfig(1e6, 64)


def gemma4_local(num_heads: int, num_kv_heads: int, window: int) -> AttentionConfig:
    return AttentionConfig(num_heads, num_kv_heads, 256, 1.0, LOCAL_ROPE, window)


def gemma4_global(num_heads: int, num_kv_heads: int, key_is_value: bool) -> AttentionConfig:
    return AttentionConfig(
        num_heads, num_kv_heads, 512, 1.0, GLOBAL_ROPE, key_is_value=key_is_value
    )


# name: local, global, hidden size, layers, period of global layers, longest, per-layer width, MoE
GEMMA4 = {
    "E2B": (gemma4_local(8, 1, 512), gemma4_global(8, 1, False), 1536, 35, 5, 131_072, 256, None),
    "E4B": (gemma4_local(8, 2, 512), gemma4_global(8, 2, False), 2560, 42, 6, 131_072, 256, None),
    "12B": (gemma4_local(16, 8, 1024), gemma4_global(16, 1, True), 3840, 48, 6, 262_144, 0, None),
    "26B-A4B": (
        gemma4_local(16, 8, 1024),
        gemma4_global(16, 2, True),
        2816,
        30,
        6,
        262_144,
        0,
        MoEConfig(num_experts=128, top_k=8, intermediate_size=704),
    ),
    "31B": (gemma4_local(32, 16, 1024), gemma4_global(32, 4, True), 5376, 60, 6, 262_144, 0, None),
}


@pytest.mark.parametrize("name", GEMMA4)
def test_gemma4(name: str, real_configs: dict[str, Any]) -> None:
    local, global_, hidden, num_layers, period, longest, per_layer, moe = GEMMA4[name]
    model = ModelConfig.from_hf(real_configs[name])
    assert (model.local, model.global_, model.moe) == (local, global_, moe)
    assert model.family == "gemma4"
    assert (model.hidden_size, model.vocab_size) == (hidden, 262_144)
    assert model.max_position_embeddings == longest
    assert (model.per_layer_input_size, model.per_layer_vocab_size) == (per_layer, 262_144)
    assert (model.rms_norm_eps, model.final_logit_softcapping) == (1e-6, 30.0)
    assert model.tie_word_embeddings
    assert [layer.index for layer in model.layers] == list(range(num_layers))
    assert [layer.index for layer in model.layers if not layer.is_local] == list(
        range(period - 1, num_layers, period)
    )
    for layer in model.layers:
        assert model.attention(layer) is (model.local if layer.is_local else model.global_)


@pytest.mark.parametrize(
    ("name", "first_shared", "local_donor", "global_donor"),
    [("E2B", 15, 13, 14), ("E4B", 24, 22, 23)],
)
def test_last_layers_read_the_keys_of_the_last_own_layer_of_their_kind(
    name: str, first_shared: int, local_donor: int, global_donor: int, real_configs: dict[str, Any]
) -> None:
    model = ModelConfig.from_hf(real_configs[name])
    for layer in model.layers:
        assert layer.owns_kv == (layer.index < first_shared)
        if not layer.owns_kv:
            assert layer.kv_layer == (local_donor if layer.is_local else global_donor)
    assert max(model.local_kv_layers) == local_donor
    assert max(model.global_kv_layers) == global_donor


def test_e2b_owns_kv_in_12_local_and_3_global_layers(real_configs: dict[str, Any]) -> None:
    model = ModelConfig.from_hf(real_configs["E2B"])
    assert model.local_kv_layers == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13]
    assert model.global_kv_layers == [4, 9, 14]


def test_sharing_layers_of_e2b_have_mlps_of_double_width(real_configs: dict[str, Any]) -> None:
    layers = ModelConfig.from_hf(real_configs["E2B"]).layers
    assert [layer.intermediate_size for layer in layers] == [6144] * 15 + [12_288] * 20
    layers = ModelConfig.from_hf(real_configs["E4B"]).layers
    assert {layer.intermediate_size for layer in layers} == {10_240}


@pytest.mark.parametrize(
    ("name", "local", "global_"),
    [
        ("E2B", 1 * 2 * 256, 1 * 2 * 512),
        ("E4B", 2 * 2 * 256, 2 * 2 * 512),
        ("12B", 8 * 2 * 256, 640),
        ("31B", 16 * 2 * 256, 4 * 640),
    ],
)
def test_values_a_page_keeps_per_token(
    name: str, local: int, global_: int, real_configs: dict[str, Any]
) -> None:
    model = ModelConfig.from_hf(real_configs[name])
    assert model.local.kv_values_per_token == local
    assert model.global_.kv_values_per_token == global_


def test_text_only_and_nested_configs_are_the_same_model(real_config: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(real_config["text_config"]) == ModelConfig.from_hf(real_config)
    del real_config["text_config"]["model_type"]
    assert ModelConfig.from_hf(real_config).family == "gemma4"


def test_as_saved_again_by_transformers(real_config: dict[str, Any]) -> None:
    """It moves the global layers' head size and head count into `per_layer_config`."""
    text = real_config["text_config"]
    is_unified = real_config["model_type"] == "gemma4_unified"
    saved = (Gemma4UnifiedTextConfig if is_unified else Gemma4TextConfig)(**text).to_dict()
    saved = json.loads(json.dumps(saved))
    assert "global_head_dim" not in saved
    assert "per_layer_config" in saved
    assert ModelConfig.from_hf(saved) == ModelConfig.from_hf(text)


def test_saved_again_with_nothing_that_differs_between_layers(real_configs: dict[str, Any]) -> None:
    """Heads of one size everywhere leave `per_layer_config` empty."""
    alike = dict(head_dim=64, global_head_dim=64, num_global_key_value_heads=16)
    text = real_configs["31B"]["text_config"] | alike
    saved = Gemma4TextConfig(**text).to_dict()
    assert not saved["per_layer_config"]
    model = ModelConfig.from_hf(saved)
    assert (model.global_.head_dim, model.global_.num_kv_heads) == (64, 16)
    assert model == ModelConfig.from_hf(text)


def test_defaults_are_those_of_transformers_classes() -> None:
    """A config.json trimmed to what differs from them."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2)
    for kind, window, longest, per_layer in (
        ("gemma4_text", 512, 131_072, 256),
        ("gemma4_unified_text", 1024, 262_144, 0),
    ):
        model = ModelConfig.from_hf({"model_type": kind, **shape})
        assert model.local == AttentionConfig(4, 2, 256, 1.0, LOCAL_ROPE, window)
        assert model.global_ == AttentionConfig(4, 2, 512, 1.0, GLOBAL_ROPE)
        assert (model.max_position_embeddings, model.per_layer_input_size) == (longest, per_layer)
        assert model.global_kv_layers == [5]


def test_global_kv_heads_count_only_where_keys_are_values(real_configs: dict[str, Any]) -> None:
    text = real_configs["31B"]["text_config"] | {"attention_k_eq_v": False}
    assert ModelConfig.from_hf(text).global_.num_kv_heads == 16


def test_the_last_layer_of_gemma4_is_global(real_configs: dict[str, Any]) -> None:
    text = real_configs["31B"]["text_config"]
    text["layer_types"][-1] = "sliding_attention"
    assert not ModelConfig.from_hf(text).layers[-1].is_local


# config.json of google/gemma-3-4b-it as first published: head counts are left to the defaults.
GEMMA3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
# google/gemma-3-1b-it: text only, everything written out.
GEMMA3_1B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32_768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10_000,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262_144,
}


def test_gemma3_4b_leaves_much_to_defaults() -> None:
    model = ModelConfig.from_hf(GEMMA3_4B)
    assert model.family == "gemma3"
    assert model.local == AttentionConfig(8, 4, 256, 1 / 16, RotaryConfig(1e4, 128), 1024)
    assert model.global_ == AttentionConfig(8, 4, 256, 1 / 16, RotaryConfig(1e6, 128, 8.0))
    assert (model.hidden_size, model.vocab_size) == (2560, 262_208)
    assert model.max_position_embeddings == 131_072
    assert model.layers[5] == LayerConfig(5, False, kv_layer=5, intermediate_size=10_240)
    assert model.global_kv_layers == [5, 11, 17, 23, 29]
    assert len(model.local_kv_layers) == 29
    assert model.layers[-1].is_local, "only Gemma 4 forces its last layer"
    assert (model.final_logit_softcapping, model.per_layer_input_size) == (None, 0)
    assert model.tie_word_embeddings


def test_gemma3_1b_without_rope_scaling() -> None:
    model = ModelConfig.from_hf(GEMMA3_1B)
    assert model.local == AttentionConfig(4, 1, 256, 1 / 16, RotaryConfig(1e4, 128), 512)
    assert model.global_ == AttentionConfig(4, 1, 256, 1 / 16, RotaryConfig(1e6, 128))
    assert (model.max_position_embeddings, model.vocab_size) == (32_768, 262_144)
    assert len(model.layers) == 26
    assert model.global_kv_layers == [5, 11, 17, 23]


def test_gemma3_scale_is_of_the_query_scalar_not_of_the_head() -> None:
    """27B: heads of 128, scalar 5376 / 32 = 168."""
    model = ModelConfig.from_hf(GEMMA3_1B | {"head_dim": 128, "query_pre_attn_scalar": 168})
    assert model.local.scale == model.global_.scale == 168**-0.5
    assert model.local.rotary.num_frequencies == 64


def test_gemma3_pattern_other_than_six() -> None:
    model = ModelConfig.from_hf(GEMMA3_1B | {"sliding_window_pattern": 4})
    assert model.global_kv_layers == [3, 7, 11, 15, 19, 23]
    renamed = GEMMA3_1B | {"_sliding_window_pattern": 4}
    del renamed["sliding_window_pattern"]
    assert ModelConfig.from_hf(renamed) == model


@pytest.mark.parametrize("old", [GEMMA3_4B["text_config"], GEMMA3_1B], ids=["4B", "1B"])
def test_gemma3_as_saved_again_by_transformers(old: dict[str, Any]) -> None:
    saved = json.loads(json.dumps(Gemma3TextConfig(**old).to_dict()))
    assert "rope_theta" not in saved
    assert "rope_parameters" in saved
    assert ModelConfig.from_hf(saved) == ModelConfig.from_hf(old)


def test_old_name_of_the_rope_type() -> None:
    model = ModelConfig.from_hf(GEMMA3_1B | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert model.global_.rotary == RotaryConfig(1e6, 128, 4.0)


def rope(**full_attention: Any) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": 1e4}
    return {"rope_parameters": {"sliding_attention": local, "full_attention": full_attention}}


def test_proportional_rope_with_factor_and_fraction(real_configs: dict[str, Any]) -> None:
    text = real_configs["31B"]["text_config"]
    half = rope(rope_type="proportional", rope_theta=5e5, partial_rotary_factor=0.5, factor=2.0)
    assert ModelConfig.from_hf(text | half).global_.rotary == RotaryConfig(5e5, 128, 2.0)
    whole = rope(rope_type="proportional", rope_theta=5e5)
    assert ModelConfig.from_hf(text | whole).global_.rotary == RotaryConfig(5e5, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"use_bidirectional_attention": "all"}, "bidirectional"),
        ({"hidden_activation": "silu"}, "'silu'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must name"),
        (rope(rope_type="yarn", rope_theta=1e6, factor=4.0), "rope_type 'yarn'"),
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not served; known are gemma3_text"),
        ({"model_type": None}, "model_type None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_refusals_name_the_value(
    family: str, changes: dict[str, Any], message: str, real_configs: dict[str, Any]
) -> None:
    text = GEMMA3_1B if family == "gemma3" else real_configs["31B"]["text_config"]
    with pytest.raises(CheckpointError) as raised:
        ModelConfig.from_hf(text | changes)
    assert message in raised.value.message


def test_layers_of_one_kind_only_are_refused() -> None:
    kinds = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    with pytest.raises(CheckpointError, match="sliding_attention and full_attention both"):
        ModelConfig.from_hf(GEMMA3_1B | kinds)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "intermediate_size"])
def test_missing_values_are_named(missing: str, real_config: dict[str, Any]) -> None:
    del real_config["text_config"][missing]
    with pytest.raises(CheckpointError, match=f"no value for '{missing}'"):
        ModelConfig.from_hf(real_config)


def test_missing_expert_counts_are_named(real_configs: dict[str, Any]) -> None:
    del real_configs["26B-A4B"]["text_config"]["num_experts"]
    with pytest.raises(CheckpointError, match="no value for 'num_experts'"):
        ModelConfig.from_hf(real_configs["26B-A4B"])


def test_sharing_must_leave_a_donor_of_each_kind(real_configs: dict[str, Any]) -> None:
    text = real_configs["E2B"]["text_config"] | {"num_kv_shared_layers": 31}
    with pytest.raises(CheckpointError, match="num_kv_shared_layers"):
        ModelConfig.from_hf(text)


def test_global_layers_that_differ_are_refused(real_configs: dict[str, Any]) -> None:
    text = real_configs["31B"]["text_config"]
    del text["global_head_dim"]
    text["per_layer_config"] = {"05": {"head_dim": 512}, "11": {"head_dim": 256}}
    with pytest.raises(CheckpointError, match="global layers differ in head_dim"):
        ModelConfig.from_hf(text)
