"""`hf_config` against the keys llama.cpp's converter writes for the published models."""

from typing import Any

import pytest

from bezel.engine.errors import CheckpointError
from bezel.engine.gguf import GGUFTensor
from bezel.engine.gguf_config import hf_config, hf_generation_config
from bezel.engine.model_config import ModelConfig


def tensors(*names: str, vocab_size: int = 262_144, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """A tensor table; what isn't named is there to make up the number."""
    table = {"token_embd.weight": (vocab_size, 64)} | dict.fromkeys(names, (8, 8))
    table |= {f"{name}.weight": shape for name, shape in shapes.items()}
    table |= {f"filler.{i}": (8,) for i in range(70)}
    return {name: GGUFTensor(name, shape, None, 0, 0) for name, shape in table.items()}


def with_prefix(architecture: str, **keys: Any) -> dict[str, Any]:
    metadata = {f"{architecture}.{key.replace('__', '.')}": keys[key] for key in keys}
    return {"general.architecture": architecture} | metadata


GEMMA3_4B = with_prefix(
    "gemma3",
    context_length=131_072,
    embedding_length=2560,
    block_count=34,
    feed_forward_length=10_240,
    attention__head_count=8,
    attention__head_count_kv=4,
    attention__key_length=256,
    attention__sliding_window=1024,
    attention__layer_norm_rms_epsilon=1e-6,
    rope__freq_base=1e6,
    rope__scaling__type="linear",
    rope__scaling__factor=8.0,
)
GEMMA3_27B = GEMMA3_4B | with_prefix(
    "gemma3",
    embedding_length=5376,
    block_count=62,
    attention__head_count=32,
    attention__head_count_kv=16,
    attention__key_length=128,
)


def gemma4(pattern: list[bool], **keys: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "context_length": 262_144,
        "block_count": len(pattern),
        "attention__key_length": 512,
        "attention__key_length_swa": 256,
        "attention__layer_norm_rms_epsilon": 1e-6,
        "attention__sliding_window_pattern": pattern,
        "attention__shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "rope__freq_base": 1e6,
        "rope__freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0,
    }
    return with_prefix("gemma4", **(common | keys))


E2B = gemma4(
    ([True] * 4 + [False]) * 7,
    embedding_length=1536,
    feed_forward_length=[6144] * 15 + [12_288] * 20,
    attention__head_count=8,
    attention__head_count_kv=1,
    attention__sliding_window=512,
    attention__shared_kv_layers=20,
    embedding_length_per_layer_input=256,
)
A4B_PATTERN = ([True] * 5 + [False]) * 5
A4B = gemma4(
    A4B_PATTERN,
    embedding_length=2816,
    feed_forward_length=2112,
    attention__head_count=16,
    attention__head_count_kv=[8 if local else 2 for local in A4B_PATTERN],
    attention__sliding_window=1024,
    expert_count=128,
    expert_used_count=8,
    expert_feed_forward_length=704,
)
A4B_TENSORS = tensors(*(f"blk.{i}.attn_v.weight" for i, local in enumerate(A4B_PATTERN) if local))
E2B_TENSORS = tensors(
    *(f"blk.{i}.attn_v.weight" for i in range(35)), per_layer_token_embd=(262_144, 35 * 256)
)


def test_gemma3_4b() -> None:
    config = hf_config(GEMMA3_4B, tensors(vocab_size=262_208))
    assert config["model_type"] == "gemma3_text"
    assert config["vocab_size"] == 262_208
    assert config["tie_word_embeddings"] is True
    assert config["query_pre_attn_scalar"] == 256
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [
        5, 11, 17, 23, 29,
    ]  # fmt: skip
    assert config["rope_parameters"] == {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }


def test_gemma3_27b_scales_by_hidden_size_over_heads() -> None:
    config = hf_config(GEMMA3_27B, tensors())
    assert config["head_dim"] == 128
    assert config["query_pre_attn_scalar"] == 168


def test_an_output_matrix_of_its_own_unties() -> None:
    assert hf_config(GEMMA3_4B, tensors("output.weight"))["tie_word_embeddings"] is False


def test_gemma4_e2b() -> None:
    config = hf_config(E2B, E2B_TENSORS)
    expected = {
        "model_type": "gemma4_text",
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "num_kv_shared_layers": 20,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262_144,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["layer_types"][:5] == ["sliding_attention"] * 4 + ["full_attention"]


def test_gemma4_26b_a4b() -> None:
    config = hf_config(A4B, A4B_TENSORS)
    expected = {
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "intermediate_size": 2112,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["full_attention"] == {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    }


@pytest.mark.parametrize(
    ("metadata", "table"),
    [(GEMMA3_4B, tensors()), (E2B, E2B_TENSORS), (A4B, A4B_TENSORS)],
    ids=["gemma3-4b", "E2B", "26B-A4B"],
)
def test_transformers_takes_every_value(metadata: dict[str, Any], table: dict[str, Any]) -> None:
    from transformers import AutoConfig

    config = hf_config(metadata, table)
    theirs = AutoConfig.for_model(**config)
    for key in config.keys() - {"head_dim", "global_head_dim", "num_key_value_heads"}:
        assert getattr(theirs, key, config[key]) == config[key], key
    ours, reread = ModelConfig.from_hf(config), ModelConfig.from_hf(theirs.to_dict())
    assert ours == reread


def test_what_is_wrong_is_named() -> None:
    def fails(metadata: dict[str, Any], match: str, table: dict[str, Any] | None = None) -> None:
        with pytest.raises(CheckpointError, match=match):
            hf_config(metadata, tensors() if table is None else table)

    fails({"general.architecture": "clip"}, "'clip'; gemma3 and gemma4 are served")
    fails(GEMMA3_4B | {"split.count": 3}, "split over several files")
    fails(GEMMA3_4B | {"gemma3.block_count": 2**31}, "block_count is 2147483648, with 71 tensors")
    fails(GEMMA3_4B | {"gemma3.embedding_length": "wide"}, "embedding_length is 'wide', not an int")
    fails({k: v for k, v in GEMMA3_4B.items() if "head_count_kv" not in k}, "count_kv is missing")
    fails(GEMMA3_4B | {"gemma3.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'")
    fails(GEMMA3_4B | {"gemma3.attention.head_count": 0}, "head_count is 0, not a positive")
    fails(E2B | {"gemma4.final_logit_softcapping": "30"}, "softcapping is '30', not a number")
    fails(GEMMA3_4B, "no tensor token_embd", {f"filler.{i}": object() for i in range(70)})
    fails(E2B | {"gemma4.attention.shared_kv_layers": 35}, "is 35 of 35 layers")
    fails(E2B | {"gemma4.feed_forward_length": [6144] * 15 + [9000] * 20}, "6144, then 9000")
    fails(E2B | {"gemma4.feed_forward_length": [6144] * 34}, "has 34 values for 35 layers")
    fails(E2B | {"gemma4.attention.head_count_kv": [1] * 34 + [2]}, "differs between layers")
    fails(A4B, "attn_v.weight in some global layers", tensors("blk.5.attn_v.weight"))


def test_generation_config_collects_every_end_of_an_answer() -> None:
    tokens = {"<turn|>": 4, "<|tool_response>": 5}
    metadata = {
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.suppress_tokens": [3],
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 64,
    }
    assert hf_generation_config(metadata, tokens.get) == {
        "eos_token_id": [1, 4, 5],
        "temperature": 1.0,
        "top_k": 64,
        "suppress_tokens": [3],
    }
