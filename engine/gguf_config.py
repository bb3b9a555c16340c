"""GGUF metadata → the `config.json` and `generation_config.json` of a Hugging Face directory.

GGUF files hold only the text decoder, so the results are those of the text-only model types. Keys
follow llama.cpp's converter. Whatever shapes the computation is set, never left to a
default of the reader; `use_bidirectional_attention` isn't, as it concerns images alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from bezel.engine.errors import CheckpointError
from bezel.engine.gguf import GGUFTensor

# Gemma's ends of a turn, besides <eos>. The last one asks for a tool's answer.
_END_TOKENS = ("<end_of_turn>", "<turn|>", "<|tool_response>")


def hf_config(metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """The `config.json` of a Gemma 3 or Gemma 4 text model.

    Raises:
        CheckpointError: another architecture, or metadata that is missing or can't be.
    """
    architecture = metadata.get("general.architecture")
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError("the GGUF is split over several files; merge them with gguf-split")
    if architecture == "gemma3":
        return _gemma3(_Keys(metadata, "gemma3", len(tensors)), tensors)
    if architecture == "gemma4":
        return _gemma4(_Keys(metadata, "gemma4", len(tensors)), tensors)
    raise CheckpointError(
        f"the GGUF holds a model of architecture {architecture!r}; gemma3 and gemma4 are served"
    )


def hf_generation_config(
    metadata: Mapping[str, Any], token_id: Callable[[str], int | None]
) -> dict[str, Any]:
    """The `generation_config.json`: every id that ends an answer, and sampling defaults if any.

    `token_id` is of the token spelled so, if the vocabulary has it.
    """
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    end_ids = [number for number in named if isinstance(number, int)]
    end_ids += [found for found in map(token_id, _END_TOKENS) if found is not None]
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(end_ids))}
    sampling = {
        "temperature": metadata.get("general.sampling.temp"),
        "top_k": metadata.get("general.sampling.top_k"),
        "top_p": metadata.get("general.sampling.top_p"),
        "suppress_tokens": metadata.get("tokenizer.ggml.suppress_tokens"),
    }
    return config | {name: value for name, value in sampling.items() if value is not None}


class _Keys:
    """Checked access to the keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, num_tensors: int) -> None:
        self.metadata = metadata
        self.architecture = architecture
        self.num_layers = self.integer("block_count")
        if not 1 <= self.num_layers <= num_tensors:
            self.fail("block_count", f"is {self.num_layers}, with {num_tensors} tensors")

    def fail(self, key: str, problem: str) -> NoReturn:
        raise CheckpointError(f"GGUF metadata {self.architecture}.{key} {problem}")

    def value(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            self.fail(key, "is missing")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(key, f"is {value!r}, not an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if not isinstance(value, (int, float)):
            self.fail(key, f"is {value!r}, not a number")
        return value

    def per_layer(self, key: str) -> list[Any]:
        """A value that is stored once, or once for each layer."""
        value = self.value(key)
        if not isinstance(value, list):
            return [value] * self.num_layers
        if len(value) != self.num_layers:
            self.fail(key, f"has {len(value)} values for {self.num_layers} layers")
        return value

    def only(self, key: str, layers: Sequence[int] = ()) -> int:
        """The one positive value of `layers`, or of all layers where that is empty."""
        by_layer = self.per_layer(key)
        values = [by_layer[layer] for layer in layers] or by_layer
        value = values[0]
        if any(other != value for other in values):
            self.fail(key, f"differs between layers of one kind: {values}")
        if not isinstance(value, int) or value < 1:
            self.fail(key, f"is {value!r}, not a positive integer")
        return value


def _common(keys: _Keys, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    if "token_embd.weight" not in tensors:
        raise CheckpointError("the GGUF has no tensor token_embd.weight")
    ids = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")}
    return {
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": keys.num_layers,
        "num_attention_heads": keys.only("attention.head_count"),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": keys.integer("attention.sliding_window"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": keys.metadata.get(ids["bos"]),
        "eos_token_id": keys.metadata.get(ids["eos"]),
        "pad_token_id": keys.metadata.get(ids["padding"]),
    }


def _gemma3(keys: _Keys, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    common = _common(keys, tensors)
    head_dim = keys.integer("attention.key_length", 256)
    # Only the 27B, the one with 62 layers, scales by something else than its head size; llama.cpp
    # tells it by the layers too.
    is_27b = keys.num_layers == 62
    return common | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_key_value_heads": keys.only("attention.head_count_kv"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": (
            common["hidden_size"] // common["num_attention_heads"] if is_27b else head_dim
        ),
        "layer_types": _layer_types(keys),
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": keys.number("rope.freq_base_swa", 10_000.0),
            },
            "full_attention": _gemma3_global_rope(keys),
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
    }


def _gemma3_global_rope(keys: _Keys) -> dict[str, Any]:
    theta = keys.number("rope.freq_base", 1_000_000.0)
    kind = keys.value("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "linear":
        keys.fail("rope.scaling.type", f"is {kind!r}; Gemma 3 scales linearly or not at all")
    factor = keys.number("rope.scaling.factor")
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _gemma4(keys: _Keys, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    layer_types = _layer_types(keys)
    num_shared = keys.integer("attention.shared_kv_layers", 0)
    if not 0 <= num_shared < keys.num_layers:
        keys.fail("attention.shared_kv_layers", f"is {num_shared} of {keys.num_layers} layers")
    per_layer_table = tensors.get("per_layer_token_embd.weight")
    config = _common(keys, tensors) | {
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "layer_types": layer_types,
        "head_dim": keys.integer("attention.key_length_swa", 256),
        "global_head_dim": keys.integer("attention.key_length", 512),
        "num_kv_shared_layers": num_shared,
        "hidden_size_per_layer_input": keys.integer("embedding_length_per_layer_input", 0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": keys.number("rope.freq_base_swa", 10_000.0),
            },
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": keys.number("rope.freq_base", 1_000_000.0),
                "partial_rotary_factor": 0.25,
            },
        },
    }
    if per_layer_table is not None:
        config["vocab_size_per_layer_input"] = per_layer_table.shape[0]
    config |= _gemma4_kv_heads(keys, layer_types, tensors, num_shared)
    return config | _gemma4_widths(keys, num_shared) | _gemma4_moe(keys)


def _gemma4_kv_heads(
    keys: _Keys, layer_types: list[str], tensors: Mapping[str, GGUFTensor], num_shared: int
) -> dict[str, Any]:
    local = [i for i, kind in enumerate(layer_types) if kind == "sliding_attention"]
    global_ = [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
    num_local = keys.only("attention.head_count_kv", local)
    num_global = keys.only("attention.head_count_kv", global_)
    owners = [i for i in global_ if i < keys.num_layers - num_shared]
    has_value = {f"blk.{i}.attn_v.weight" in tensors for i in owners}
    if len(has_value) > 1:
        raise CheckpointError("the GGUF has attn_v.weight in some global layers but not in all")
    return {
        "num_key_value_heads": num_local,
        "num_global_key_value_heads": num_global if num_global != num_local else None,
        "attention_k_eq_v": has_value == {False},
    }


def _gemma4_widths(keys: _Keys, num_shared: int) -> dict[str, Any]:
    """The MLP is as wide in every layer, or twice as wide in the layers that share KV."""
    first_shared = keys.num_layers - num_shared
    width = keys.only("feed_forward_length", range(first_shared))
    shared_width = keys.only("feed_forward_length", range(first_shared, keys.num_layers))
    if shared_width not in (width, 2 * width):
        keys.fail("feed_forward_length", f"is {width}, then {shared_width}: not twice as wide")
    return {"intermediate_size": width, "use_double_wide_mlp": shared_width == 2 * width}


def _gemma4_moe(keys: _Keys) -> dict[str, Any]:
    num_experts = keys.integer("expert_count", 0)
    if num_experts == 0:
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": num_experts,
        "top_k_experts": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
    }


def _layer_types(keys: _Keys) -> list[str]:
    """From a flag for each layer (true: sliding window), or a period, which is 6 by default."""
    pattern = keys.value("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        is_local = keys.per_layer("attention.sliding_window_pattern")
    else:
        period = keys.integer("attention.sliding_window_pattern", 6)
        is_local = [period > 0 and (i + 1) % period != 0 for i in range(keys.num_layers)]
    return ["sliding_attention" if local else "full_attention" for local in is_local]
