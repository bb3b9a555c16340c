"""A model as a plan sees it: its shape, its weights by component, and what pages it keeps.

Weights are those of the engine's own model, on the meta device or loaded.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import nn

from bezel.engine.kv_layout import KVLayout
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.decoder import Decoder
from bezel.engine.models.registry import build_model
from bezel.kernels.packed import WeightFormat, packed_bytes

DTypeName = Literal["bfloat16", "float32"]
KVDTypeName = Literal["auto", "bfloat16", "float32", "fp8"]

FormatChoice = Callable[[Decoder], Mapping[str, WeightFormat]]  # by parameter, of a meta model

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}

# Where parameters belong, by words in their names.
_COMPONENTS = {
    "self_attn.qkv_proj": "projections",
    "self_attn.o_proj": "projections",
    "mlp.": "MLP",
    "experts.": "experts",
    "embed_tokens.": "head",
    "lm_head.": "head",
    "embed_tokens_per_layer.": "per-layer table",
    "router.": "rest",
    "per_layer_": "rest",
    "norm": "rest",
    "layer_scalar": "rest",
}


@dataclass(slots=True)
class Weights:
    """Of one component: bytes and number of all parameters, parameters of matrices, and values that
    go into and come out of these for one row; parameters by the format they are packed in."""

    num_bytes: int = 0
    num_parameters: int = 0
    num_products: int = 0
    num_ends: int = 0
    num_packed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """`weights` by component: "projections", "MLP", "rest", "head", and of some models "experts",
    "per-layer table" and "embedding table". `value_bytes` are those of a weight and of an
    activation, `kv_value_bytes` those of a number in a KV page."""

    name: str
    config: ModelConfig
    weights: dict[str, Weights]
    layout: KVLayout
    dtype: str
    kv_dtype: str

    @classmethod
    def of(
        cls,
        name: str,
        config: ModelConfig,
        dtype: DTypeName = "bfloat16",
        kv_cache_dtype: KVDTypeName = "auto",
        block_size: int = 16,
        choose: FormatChoice | None = None,
    ) -> "PlannedModel":
        """From the shape alone: nothing is loaded. `block_size` is that of a local page, `choose`
        says which weights are packed.

        Raises:
            ConfigError: from `choose`.
        """
        model = build_model(config, getattr(torch, dtype), torch.device("meta"))
        formats = {} if choose is None else choose(model)
        weights = weights_of(model.named_parameters(), config, formats)
        kv_dtype = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
        layout = KVLayout.for_model(config, VALUE_BYTES[kv_dtype], block_size)
        return cls(name, config, weights, layout, dtype, kv_dtype)

    @property
    def value_bytes(self) -> int:
        return VALUE_BYTES[self.dtype]

    @property
    def kv_value_bytes(self) -> int:
        return VALUE_BYTES[self.kv_dtype]

    @property
    def weight_bytes(self) -> int:
        return sum(part.num_bytes for part in self.weights.values())

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.weights.values())

    @property
    def num_packed(self) -> dict[str, int]:
        """Parameters by the format they are packed in, the most common first."""
        counts: Counter[str] = Counter()
        for part in self.weights.values():
            counts.update(part.num_packed)
        return dict(counts.most_common())

    @property
    def full_length_bytes_per_token(self) -> int:
        """Bytes a token takes in a cache that knows no windows: every layer keeps K and V of every
        token, also where layers share them or K is made of V."""
        values = 0
        for layer in self.config.layers:
            attention = self.config.attention(layer)
            values += 2 * attention.num_kv_heads * attention.head_dim
        return values * self.kv_value_bytes


def component_of(name: str) -> str:
    """The one component of a parameter."""
    [component] = {found for word, found in _COMPONENTS.items() if word in name}
    return component


def weights_of(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: ModelConfig,
    formats: Mapping[str, WeightFormat],
) -> dict[str, Weights]:
    """By component. Where the output head has a matrix of its own, that of the embeddings is a
    table of which steps read rows only."""
    weights: dict[str, Weights] = {}
    for name, parameter in parameters:
        component = component_of(name)
        if name == "embed_tokens.weight" and not config.tie_word_embeddings:
            component = "embedding table"
        part = weights.setdefault(component, Weights())
        part.num_parameters += parameter.numel()
        if name in formats:
            format = formats[name]
            *matrices, num_outputs, num_inputs = parameter.shape
            part.num_bytes += prod(matrices) * packed_bytes(num_outputs, num_inputs, format)
            part.num_packed[format] = part.num_packed.get(format, 0) + parameter.numel()
        else:
            part.num_bytes += parameter.nbytes
        if parameter.dim() > 1:
            part.num_products += parameter.numel()
            part.num_ends += sum(parameter.shape[-2:])
    return weights
