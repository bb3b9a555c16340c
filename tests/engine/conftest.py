"""Fixtures of the engine's tests."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers


def _gemma4(num_layers: int, period: int, *, unified: bool = False, **text: Any) -> dict[str, Any]:
    """A published config.json: every `period`-th layer is global."""
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    common: dict[str, Any] = {
        "model_type": "gemma4_unified_text" if unified else "gemma4_text",
        "vocab_size": 262_144,
        "num_hidden_layers": num_layers,
        "layer_types": kinds * (num_layers // period),
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_k_eq_v": False,
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "use_bidirectional_attention": "vision",
        "sliding_window": 1024,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    }
    if not unified:  # the 12B's class knows nothing of these
        common |= {
            "vocab_size_per_layer_input": 262_144,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": False,
        }
    return {
        "model_type": "gemma4_unified" if unified else "gemma4",
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
        "text_config": common | text,
    }


# What the two models for phones say otherwise.
_PHONES: dict[str, Any] = dict(
    num_attention_heads=8,
    hidden_size_per_layer_input=256,
    use_bidirectional_attention=None,
    sliding_window=512,
    max_position_embeddings=131_072,
)
_REAL_CONFIGS = {
    "E2B": _gemma4(
        35,
        5,
        hidden_size=1536,
        intermediate_size=6144,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        **_PHONES,
    ),
    "E4B": _gemma4(
        42,
        6,
        hidden_size=2560,
        intermediate_size=10_240,
        num_key_value_heads=2,
        num_kv_shared_layers=18,
        **_PHONES,
    ),
    "12B": _gemma4(
        48,
        6,
        unified=True,
        hidden_size=3840,
        intermediate_size=15_360,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
    ),
    "26B-A4B": _gemma4(
        30,
        6,
        hidden_size=2816,
        intermediate_size=2112,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        attention_k_eq_v=True,
    ),
    "31B": _gemma4(
        60,
        6,
        hidden_size=5376,
        intermediate_size=21_504,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
    ),
}


@pytest.fixture
def real_configs() -> dict[str, dict[str, Any]]:
    """`config.json` of the five Gemma 4 models, by the name of their size."""
    return copy.deepcopy(_REAL_CONFIGS)


@pytest.fixture(params=list(_REAL_CONFIGS))
def real_config(request: pytest.FixtureRequest, real_configs: dict[str, Any]) -> dict[str, Any]:
    """One of the five after the other."""
    config: dict[str, Any] = real_configs[request.param]
    return config


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a small GGUF file with the `gguf` package, an implementation other than Bezel's."""

    def write(
        architecture: str,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        quantized: Mapping[str, gguf.GGMLQuantizationType] | None = None,
        name: str = "tiny.gguf",
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        for key, value in metadata.items():
            add[type(value)](key, value)
        for tensor_name, values in tensors.items():
            kind = (quantized or {}).get(tensor_name)
            if kind is None:
                writer.add_tensor(tensor_name, values)
            else:
                writer.add_tensor(tensor_name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def make_backend() -> Callable[..., tokenizers.Tokenizer]:
    """A small vocabulary built like Gemma's: BPE that falls back to bytes, "▁" for a space."""

    def make(turn_tokens: tuple[str, str] = ("<start_of_turn>", "<end_of_turn>")) -> Any:
        control = ["<pad>", "<eos>", "<bos>", "<unk>", *turn_tokens]
        letters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>/|,.:!?_é日"]
        merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("e", "l"), ("l", "o"), ("▁", "▁")]
        tokens = control + ["\n", "\n\n"] + [f"<0x{byte:02X}>" for byte in range(256)] + letters
        tokens += ["".join(pair) for pair in merges]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(
            models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        backend.add_special_tokens(control)
        backend.add_tokens(
            [tokenizers.AddedToken(newlines, normalized=False) for newlines in ("\n", "\n\n")]
        )
        assert backend.get_vocab_size() == len(tokens)
        return backend

    return make
