"""What `config.json` says of the published models, so that a plan needs neither files nor network.

Only what shapes the computation and differs from `ModelConfig`'s defaults. Source: `config.json` of
each checkpoint under https://huggingface.co/google; the instruction-tuned twins have the same.
"""

from collections.abc import Mapping
from typing import Any

_PHONE = {
    "model_type": "gemma4_text",
    "num_attention_heads": 8,
    "hidden_size_per_layer_input": 256,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
}
_DESKTOP = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 262_144,
    "attention_k_eq_v": True,
}
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 262_144,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
    },
    "gemma-4-E2B": _PHONE
    | {
        "num_hidden_layers": 35,
        "sliding_window_pattern": 5,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
    },
    "gemma-4-E4B": _PHONE
    | {
        "num_hidden_layers": 42,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
    },
    "gemma-4-12B": _DESKTOP
    | {
        "num_hidden_layers": 48,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
    },
    "gemma-4-26B-A4B": _DESKTOP
    | {
        "num_hidden_layers": 30,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "gemma-4-31B": _DESKTOP
    | {
        "num_hidden_layers": 60,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
}


def published_name(name: str) -> str | None:
    """The key in `PUBLISHED` of a hub id or bare name: `google/gemma-4-31b-it` → `gemma-4-31B`."""
    wanted = name.rpartition("/")[2].lower().removesuffix("-it")
    return next((known for known in PUBLISHED if known.lower() == wanted), None)


def published_config(name: str) -> dict[str, Any] | None:
    """Its config.json, or None; case, organisation and a final `-it` don't matter."""
    known = published_name(name)
    return None if known is None else PUBLISHED[known]
