"""The shape of a Gemma decoder, read from a Hugging Face `config.json`.

Everything is per attention *kind*: Gemma's local (sliding-window) layers all share one shape, its
global layers another. A value that Bezel can't serve is a `CheckpointError` that names it.
Values by model: https://huggingface.co/google, `config.json` of each checkpoint.
"""

from dataclasses import dataclass
from typing import Any, Literal

from bezel.engine.errors import CheckpointError

GEMMA3_TYPES = ("gemma3_text", "gemma3")
GEMMA4_TYPES = ("gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified")

# Where transformers' gemma4_unified assumes something else than its gemma4 does: it saves no
# `hidden_size_per_layer_input` at all.
UNIFIED_DEFAULTS = {
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "hidden_size_per_layer_input": 0,
}


@dataclass(frozen=True, slots=True)
class RotaryConfig:
    """Frequencies of one attention kind: `theta ** (-2j / head_dim) / factor`.

    Only the first `num_frequencies` pairs turn; the others stay as they are (Gemma 4's
    proportional RoPE: 64 of 256 pairs).
    """

    theta: float
    num_frequencies: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Shape of every layer of one kind. `window` is None on global layers.

    `key_is_value`: K = RoPE(w_k ⊙ V), so pages hold V and the turned part of K only.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary: RotaryConfig
    window: int | None = None
    key_is_value: bool = False

    @property
    def kv_values_per_token(self) -> int:
        """Numbers a page keeps for one token of one layer."""
        if self.key_is_value:
            return self.num_kv_heads * (self.head_dim + 2 * self.rotary.num_frequencies)
        return self.num_kv_heads * 2 * self.head_dim


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Routed experts that stand beside the dense MLP of every layer."""

    num_experts: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """`kv_layer` is the layer whose keys and values this one reads: itself, or an earlier donor."""

    index: int
    is_local: bool
    kv_layer: int
    intermediate_size: int

    @property
    def owns_kv(self) -> bool:
        return self.kv_layer == self.index


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Gemma decoder. `per_layer_input_size` is 0 where there are no per-layer embeddings."""

    family: Literal["gemma3", "gemma4"]
    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    final_logit_softcapping: float | None
    tie_word_embeddings: bool
    local: AttentionConfig
    global_: AttentionConfig
    layers: tuple[LayerConfig, ...]
    per_layer_input_size: int = 0
    per_layer_vocab_size: int = 0
    moe: MoEConfig | None = None

    def attention(self, layer: LayerConfig) -> AttentionConfig:
        return self.local if layer.is_local else self.global_

    @property
    def local_kv_layers(self) -> list[int]:
        """Indices of the local layers that own KV, in order."""
        return [layer.index for layer in self.layers if layer.is_local and layer.owns_kv]

    @property
    def global_kv_layers(self) -> list[int]:
        """Indices of the global layers that own KV, in order."""
        return [layer.index for layer in self.layers if not layer.is_local and layer.owns_kv]

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read a `config.json`, of a text-only or a multimodal checkpoint.

        Raises:
            CheckpointError: unknown model type, or a value Bezel can't serve.
        """
        text = config.get("text_config", config)
        model_type = text.get("model_type", config.get("model_type"))
        try:
            if model_type in GEMMA3_TYPES:
                return _gemma3(text)
            if model_type in GEMMA4_TYPES:
                return _gemma4(UNIFIED_DEFAULTS | text if "unified" in model_type else text)
        except KeyError as error:
            raise CheckpointError(f"config.json has no value for {error}") from error
        known = ", ".join((*GEMMA3_TYPES, *GEMMA4_TYPES))
        raise CheckpointError(f"model_type {model_type!r} is not served; known are {known}")


def _gemma3(text: dict[str, Any]) -> ModelConfig:
    _refuse_unservable(text)
    is_local = _layer_kinds(text)
    head_dim = text.get("head_dim", 256)
    scale = text.get("query_pre_attn_scalar", 256) ** -0.5
    rope = text.get("rope_parameters") or {}
    local_rope = rope.get(
        "sliding_attention", {"rope_theta": text.get("rope_local_base_freq", 1e4)}
    )
    global_rope = rope.get(
        "full_attention",
        {"rope_theta": text.get("rope_theta", 1e6)} | (text.get("rope_scaling") or {}),
    )
    # Gemma 3 4B's config.json leaves the head counts to transformers' defaults.
    num_heads, num_kv_heads = text.get("num_attention_heads", 8), text.get("num_key_value_heads", 4)
    shape = (num_heads, num_kv_heads, head_dim, scale)
    return ModelConfig(
        family="gemma3",
        vocab_size=text.get("vocab_size", 262_208),
        hidden_size=text["hidden_size"],
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        max_position_embeddings=text.get("max_position_embeddings", 131_072),
        final_logit_softcapping=text.get("final_logit_softcapping"),
        tie_word_embeddings=text.get("tie_word_embeddings", True),
        local=AttentionConfig(
            *shape, _rotary(local_rope, head_dim), window=text.get("sliding_window", 4096)
        ),
        global_=AttentionConfig(*shape, _rotary(global_rope, head_dim)),
        layers=tuple(
            LayerConfig(i, local, kv_layer=i, intermediate_size=text["intermediate_size"])
            for i, local in enumerate(is_local)
        ),
    )


def _gemma4(text: dict[str, Any]) -> ModelConfig:
    _refuse_unservable(text)
    is_local = _layer_kinds(text)
    is_local[-1] = False  # the last layer is global whatever the list says, as in transformers
    num_heads, num_kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    local_dim = text.get("head_dim", 256)
    # transformers saves what differs between layers as `per_layer_config`, in place of the fields.
    default_global_dim = local_dim if "per_layer_config" in text else 512
    global_dim = (
        text.get("global_head_dim") or _per_layer_value(text, "head_dim") or default_global_dim
    )
    key_is_value = text.get("attention_k_eq_v", False)
    global_kv_heads = (
        text.get("num_global_key_value_heads")
        or _per_layer_value(text, "num_key_value_heads")
        or num_kv_heads
    )
    rope = text.get("rope_parameters") or {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
    }
    per_layer_size = text.get("hidden_size_per_layer_input", 256) or 0
    return ModelConfig(
        family="gemma4",
        vocab_size=text.get("vocab_size", 262_144),
        hidden_size=text["hidden_size"],
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        max_position_embeddings=text.get("max_position_embeddings", 131_072),
        final_logit_softcapping=text.get("final_logit_softcapping"),
        tie_word_embeddings=text.get("tie_word_embeddings", True),
        local=AttentionConfig(
            num_heads,
            num_kv_heads,
            local_dim,
            scale=1.0,
            rotary=_rotary(rope["sliding_attention"], local_dim),
            window=text.get("sliding_window", 512),
        ),
        global_=AttentionConfig(
            num_heads,
            global_kv_heads if key_is_value else num_kv_heads,
            global_dim,
            scale=1.0,
            rotary=_rotary(rope["full_attention"], global_dim),
            key_is_value=key_is_value,
        ),
        layers=_gemma4_layers(text, is_local),
        per_layer_input_size=per_layer_size,
        per_layer_vocab_size=text.get("vocab_size_per_layer_input", 262_144),
        moe=_gemma4_moe(text),
    )


def _per_layer_value(text: dict[str, Any], name: str) -> int | None:
    """What transformers saves in `per_layer_config` for the global layers, all of them alike."""
    overrides = (text.get("per_layer_config") or {}).values()
    found = {override[name] for override in overrides if name in override}
    if len(found) > 1:
        raise CheckpointError(f"global layers differ in {name} ({sorted(found)}); not served")
    return found.pop() if found else None


def _gemma4_layers(text: dict[str, Any], is_local: list[bool]) -> tuple[LayerConfig, ...]:
    first_shared = len(is_local) - (text.get("num_kv_shared_layers") or 0)
    width = text["intermediate_size"]
    shared_width = width * 2 if text.get("use_double_wide_mlp", False) else width
    donors = {local: i for i, local in enumerate(is_local[:first_shared])}
    if set(donors) != set(is_local):
        raise CheckpointError("num_kv_shared_layers leaves an attention kind without own keys")
    return tuple(
        LayerConfig(
            i,
            local,
            kv_layer=i if i < first_shared else donors[local],
            intermediate_size=width if i < first_shared else shared_width,
        )
        for i, local in enumerate(is_local)
    )


def _gemma4_moe(text: dict[str, Any]) -> MoEConfig | None:
    if not text.get("enable_moe_block", False):
        return None
    return MoEConfig(text["num_experts"], text["top_k_experts"], text["moe_intermediate_size"])


def _layer_kinds(text: dict[str, Any]) -> list[bool]:
    """For each layer whether it is local: `layer_types`, or every n-th global as in old configs."""
    num_layers = text["num_hidden_layers"]
    pattern = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6
    types = text.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)
    ]
    if len(types) != num_layers or set(types) != {"sliding_attention", "full_attention"}:
        raise CheckpointError(
            f"layer_types must name {num_layers} layers, sliding_attention and full_attention both"
        )
    return [kind == "sliding_attention" for kind in types]


def _rotary(rope: dict[str, Any], head_dim: int) -> RotaryConfig:
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta, pairs = float(rope["rope_theta"]), head_dim // 2
    if kind == "default":
        return RotaryConfig(theta, pairs)
    if kind == "linear":
        return RotaryConfig(theta, pairs, factor=float(rope["factor"]))
    if kind == "proportional":
        partial = rope.get("partial_rotary_factor", 1.0)
        turned = int(partial * head_dim // 2)
        return RotaryConfig(theta, turned, factor=float(rope.get("factor", 1.0)))
    raise CheckpointError(f"rope_type {kind!r} is not served")


def _refuse_unservable(text: dict[str, Any]) -> None:
    if text.get("attention_bias", False):
        raise CheckpointError("attention_bias is not served; no Gemma checkpoint uses it")
    if text.get("use_bidirectional_attention") in (True, "all"):
        raise CheckpointError("bidirectional attention (an embedding model) is not served")
    activation = text.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"hidden_activation {activation!r} is not served")
    if text.get("attn_logit_softcapping"):
        raise CheckpointError("attn_logit_softcapping is not served; Gemma 3 and 4 don't use it")
