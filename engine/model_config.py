"""The shape of a Gemma decoder, read from a Hugging Face `config.json`.

Everything is per attention *kind*: Gemma's local (sliding-window) layers all share one shape, its
global layers another. A value that Bezel can't serve is a `CheckpointError` that names it.
Values by model: https://huggingface.co/google, `config.json` of each checkpoint.
"""

from dataclasses import dataclass
from typing import Any, Literal

from bezel.engine.config_values import MAX_TOKENS, ConfigValues
from bezel.engine.errors import CheckpointError

GEMMA3_TYPES = ("gemma3_text", "gemma3")
GEMMA4_TYPES = ("gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified")

MAX_LAYERS, MAX_EXPERTS = 1024, 4096

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
        whole = ConfigValues(config)
        text = whole.object("text_config") if "text_config" in whole else whole
        model_type = text.values.get("model_type", config.get("model_type"))
        if model_type in GEMMA3_TYPES:
            return _gemma3(text)
        if model_type in GEMMA4_TYPES:
            if "unified" in model_type:
                text = ConfigValues({**UNIFIED_DEFAULTS, **text.values}, text.place)
            return _gemma4(text)
        known = ", ".join((*GEMMA3_TYPES, *GEMMA4_TYPES))
        raise CheckpointError(f"model_type {model_type!r} is not served; known are {known}")


def _gemma3(text: ConfigValues) -> ModelConfig:
    _refuse_unservable(text)
    is_local = _layer_kinds(text)
    head_dim = text.count("head_dim", 256)
    scale = text.number("query_pre_attn_scalar", 256) ** -0.5
    rope = text.object("rope_parameters")
    local_rope = {"rope_theta": text.number("rope_local_base_freq", 1e4)}
    global_rope = {"rope_theta": text.number("rope_theta", 1e6)}
    global_rope |= text.object("rope_scaling").values
    # Gemma 3 4B's config.json leaves the head counts to transformers' defaults.
    shape = (*_heads(text, 8, 4), head_dim, scale)
    width = text.count("intermediate_size")
    return ModelConfig(
        family="gemma3",
        **_common(text, vocab_size=262_208),
        local=AttentionConfig(
            *shape,
            _rotary(rope, "sliding_attention", local_rope, head_dim),
            window=text.count("sliding_window", 4096, high=MAX_TOKENS),
        ),
        global_=AttentionConfig(*shape, _rotary(rope, "full_attention", global_rope, head_dim)),
        layers=tuple(
            LayerConfig(i, local, kv_layer=i, intermediate_size=width)
            for i, local in enumerate(is_local)
        ),
    )


def _gemma4(text: ConfigValues) -> ModelConfig:
    _refuse_unservable(text)
    is_local = _layer_kinds(text)
    is_local[-1] = False  # the last layer is global whatever the list says, as in transformers
    num_heads, num_kv_heads = _heads(text)
    local_dim = text.count("head_dim", 256)
    global_dim, global_kv_heads = _gemma4_global_shape(text, num_heads, num_kv_heads, local_dim)
    rope = text.object("rope_parameters")
    proportional = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    has_none = text.values.get("hidden_size_per_layer_input", 256) is None
    per_layer_size = 0 if has_none else text.count("hidden_size_per_layer_input", 256, low=0)
    return ModelConfig(
        family="gemma4",
        **_common(text, vocab_size=262_144),
        local=AttentionConfig(
            num_heads,
            num_kv_heads,
            local_dim,
            scale=1.0,
            rotary=_rotary(rope, "sliding_attention", {"rope_theta": 1e4}, local_dim),
            window=text.count("sliding_window", 512, high=MAX_TOKENS),
        ),
        global_=AttentionConfig(
            num_heads,
            global_kv_heads,
            global_dim,
            scale=1.0,
            rotary=_rotary(rope, "full_attention", proportional, global_dim),
            key_is_value=text.flag("attention_k_eq_v", False),
        ),
        layers=_gemma4_layers(text, is_local),
        per_layer_input_size=per_layer_size,
        per_layer_vocab_size=text.count("vocab_size_per_layer_input", 262_144, high=MAX_TOKENS),
        moe=_gemma4_moe(text),
    )


def _common(text: ConfigValues, vocab_size: int) -> dict[str, Any]:
    """What both families have alike; `vocab_size` is the family's default."""
    has_cap = "final_logit_softcapping" in text
    return {
        "vocab_size": text.count("vocab_size", vocab_size, high=MAX_TOKENS),
        "hidden_size": text.count("hidden_size"),
        "rms_norm_eps": text.number("rms_norm_eps", 1e-6),
        "max_position_embeddings": text.count("max_position_embeddings", 131_072, high=MAX_TOKENS),
        "final_logit_softcapping": text.number("final_logit_softcapping") if has_cap else None,
        "tie_word_embeddings": text.flag("tie_word_embeddings", True),
    }


def _heads(
    text: ConfigValues, num_heads: int | None = None, num_kv_heads: int | None = None
) -> tuple[int, int]:
    """Query and key heads, with these defaults."""
    num_heads = text.count("num_attention_heads", num_heads)
    num_kv_heads = text.count("num_key_value_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise text.fail("num_key_value_heads", f"which doesn't divide {num_heads} heads")
    return num_heads, num_kv_heads


def _gemma4_global_shape(
    text: ConfigValues, num_heads: int, num_kv_heads: int, local_dim: int
) -> tuple[int, int]:
    """Width of a global head, and how many key heads there are."""
    # transformers saves what differs between layers as `per_layer_config`, in place of the fields.
    other = _per_layer_values(text)
    default_dim = local_dim if "per_layer_config" in text else 512
    source = text if "global_head_dim" in text else other
    global_dim = source.count("global_head_dim" if source is text else "head_dim", default_dim)
    if not text.flag("attention_k_eq_v", False):
        return global_dim, num_kv_heads
    key = "num_global_key_value_heads"
    if key not in text:
        text, key = other, "num_key_value_heads"
    global_kv_heads = text.count(key, num_kv_heads)
    if num_heads % global_kv_heads:
        raise text.fail(key, f"which doesn't divide {num_heads} heads")
    return global_dim, global_kv_heads


def _per_layer_values(text: ConfigValues) -> ConfigValues:
    """What transformers saves in `per_layer_config` for the global layers, all of them alike."""
    by_layer = text.object("per_layer_config")
    merged: dict[str, Any] = {}
    for layer in by_layer.values:
        for name, value in by_layer.object(layer).values.items():
            if merged.setdefault(name, value) != value:
                raise CheckpointError(f"global layers differ in {name}; not served")
    return ConfigValues(merged, by_layer.place)


def _gemma4_layers(text: ConfigValues, is_local: list[bool]) -> tuple[LayerConfig, ...]:
    first_shared = len(is_local) - text.count("num_kv_shared_layers", 0, low=0)
    width = text.count("intermediate_size")
    shared_width = width * 2 if text.flag("use_double_wide_mlp", False) else width
    donors = {local: i for i, local in enumerate(is_local[: max(0, first_shared)])}
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


def _gemma4_moe(text: ConfigValues) -> MoEConfig | None:
    if not text.flag("enable_moe_block", False):
        return None
    num_experts = text.count("num_experts", high=MAX_EXPERTS)
    top_k = text.count("top_k_experts", high=num_experts)
    return MoEConfig(num_experts, top_k, text.count("moe_intermediate_size"))


def _layer_kinds(text: ConfigValues) -> list[bool]:
    """For each layer whether it is local: `layer_types`, or every n-th global as in old configs."""
    num_layers = text.count("num_hidden_layers", high=MAX_LAYERS)
    if "layer_types" in text:
        types = text.words("layer_types")
    else:
        pattern = text.count("sliding_window_pattern", text.count("_sliding_window_pattern", 6))
        types = [
            "sliding_attention" if (i + 1) % pattern else "full_attention"
            for i in range(num_layers)
        ]
    if len(types) != num_layers or set(types) != {"sliding_attention", "full_attention"}:
        raise CheckpointError(
            f"layer_types must name {num_layers} layers, sliding_attention and full_attention both"
        )
    return [kind == "sliding_attention" for kind in types]


def _rotary(
    parameters: ConfigValues, kind: str, default: dict[str, Any], head_dim: int
) -> RotaryConfig:
    """Of one kind of attention: what `parameters` say, or else `default`."""
    rope = parameters.object(kind) if kind in parameters else ConfigValues(default, kind)
    type_ = rope.values.get("rope_type", rope.values.get("type", "default"))
    theta, pairs = rope.number("rope_theta"), head_dim // 2
    if head_dim % 2:
        raise CheckpointError(f"heads of {head_dim} values, an odd number, can't be turned")
    if type_ == "default":
        return RotaryConfig(theta, pairs)
    if type_ == "linear":
        return RotaryConfig(theta, pairs, factor=rope.number("factor"))
    if type_ == "proportional":
        turned = int(rope.number("partial_rotary_factor", 1.0) * head_dim // 2)
        if not 1 <= turned <= pairs:
            raise rope.fail("partial_rotary_factor", f"of {pairs} pairs")
        return RotaryConfig(theta, turned, factor=rope.number("factor", 1.0))
    raise CheckpointError(f"rope_type {type_!r} is not served")


def _refuse_unservable(text: ConfigValues) -> None:
    if text.flag("attention_bias", False):
        raise CheckpointError("attention_bias is not served; no Gemma checkpoint uses it")
    if text.values.get("use_bidirectional_attention") in (True, "all"):
        raise CheckpointError("bidirectional attention (an embedding model) is not served")
    activation = text.values.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"hidden_activation {activation!r} is not served")
    if text.values.get("attn_logit_softcapping"):
        raise CheckpointError("attn_logit_softcapping is not served; Gemma 3 and 4 don't use it")
