"""What a step of the engine must read and compute, part by part, and the time an H100 needs for it.

Weights are those of the engine's own model, on the meta device; keys and values, and the FLOPs of
attention, are counted as the cases of `kernels.py` count them. Products of T rows with n parameters
are 2·n bytes and 2·n·T FLOPs. An H100 computes 295 FLOPs while it reads a byte, so up to 295 rows
take no longer than one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from attention_cases import Paged, paged_shapes
from kernel_cases import DTYPE, PAGE_SIZE

from bezel.engine.kv_layout import KVLayout
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import build_model

# NVIDIA's data sheet of the H100 SXM (https://www.nvidia.com/en-us/data-center/h100): bfloat16
# products without sparsity, which is half of what the sheet gives with it.
DEVICE = "H100 SXM"
BYTES_PER_S = 3.35e12
FLOPS_PER_S = 989e12
MEMORY_BYTES = 80e9

# Where parameters belong, by words in their names.
COMPONENTS = {
    "self_attn.qkv_proj": "projections",
    "self_attn.o_proj": "projections",
    "mlp.": "MLP",
    "experts.": "experts",
    "embed_tokens.": "head",
    "embed_tokens_per_layer.": "per-layer table",
    "router.": "rest",
    "per_layer_": "rest",
    "norm": "rest",
    "layer_scalar": "rest",
}


@dataclass
class Weights:
    """Of one component: bytes of all parameters, parameters of matrices, and values that go into
    and come out of these for one row."""

    num_bytes: int = 0
    num_products: int = 0
    num_ends: int = 0


@dataclass(frozen=True)
class Model:
    """A shape, its weights by component, and what pages it keeps."""

    name: str
    config: ModelConfig
    weights: dict[str, Weights]
    layout: KVLayout

    @classmethod
    def of(cls, name: str, config: ModelConfig) -> "Model":
        assert config.tie_word_embeddings
        layout = KVLayout.for_model(config, DTYPE.itemsize, PAGE_SIZE)
        return cls(name, config, weights_of(config), layout)

    @property
    def weight_bytes(self) -> int:
        return sum(part.num_bytes for part in self.weights.values())

    def held_bytes(self, num_seqs: int, context: int) -> int:
        """Weights and the pages of sequences; not what steps compute with."""
        pages = self.layout.num_bytes(self.layout.pages(context))
        return self.weight_bytes + num_seqs * pages

    def most_sequences(self, context: int) -> int:
        """That fit into the device's memory beside the weights."""
        pages = self.held_bytes(1, context) - self.weight_bytes
        return int((MEMORY_BYTES - self.weight_bytes) // pages)


@dataclass(frozen=True)
class Step:
    """`num_seqs` sequences with `q_len` new tokens each, which are `context` long with these.

    Logits are wanted for `num_logits` of the tokens.
    """

    num_seqs: int
    q_len: int
    context: int
    num_logits: int

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.q_len


@dataclass(frozen=True)
class Part:
    """`activation_bytes` are those of the rows that products and attention take in and put out."""

    name: str
    num_bytes: float
    num_flops: float
    activation_bytes: float = 0

    @property
    def seconds(self) -> float:
        return max(self.num_bytes / BYTES_PER_S, self.num_flops / FLOPS_PER_S)

    @property
    def is_compute_bound(self) -> bool:
        return self.num_flops / FLOPS_PER_S > self.num_bytes / BYTES_PER_S


def component_of(name: str) -> str:
    """The one component of a parameter."""
    [component] = {found for word, found in COMPONENTS.items() if word in name}
    return component


def weights_of(config: ModelConfig) -> dict[str, Weights]:
    """By component, from the engine's model on the meta device."""
    weights: dict[str, Weights] = {}
    for name, parameter in build_model(config, DTYPE, torch.device("meta")).named_parameters():
        part = weights.setdefault(component_of(name), Weights())
        part.num_bytes += parameter.nbytes
        if parameter.dim() > 1:
            part.num_products += parameter.numel()
            part.num_ends += sum(parameter.shape[-2:])
    return weights


def distinct_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Expected number that some token chooses, if each chooses `top_k` with equal chances.

    One expert is left out by a token with probability 1 - k/E, by all with the T-th power of it.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def parts_of(model: Model, step: Step) -> Iterator[Part]:
    """Each over all layers: products, experts, output head, embeddings, attention of both kinds."""
    config, num_tokens = model.config, step.num_tokens
    for name in ("projections", "MLP", "rest"):
        yield _products(name, model.weights[name], num_tokens, num_tokens)
    if config.moe is not None:
        num_experts, top_k = config.moe.num_experts, config.moe.top_k
        share = distinct_experts(num_experts, top_k, num_tokens) / num_experts
        weights, num_chosen = model.weights["experts"], num_tokens * top_k
        yield _products("experts", weights, num_chosen / num_experts, num_chosen, share)
    if step.num_logits:
        yield _products("head", model.weights["head"], step.num_logits, step.num_logits)
    width = config.hidden_size + len(config.layers) * config.per_layer_input_size
    yield Part("embedding rows", num_tokens * width * DTYPE.itemsize, 0)
    for _, paged in paged_shapes({model.name: config}):
        is_local = paged.attention.window is not None
        num_layers = sum(layer.is_local == is_local for layer in config.layers)
        yield _attention(paged, step, num_layers)


def _products(
    name: str, weights: Weights, rows_per_matrix: float, num_rows: int, share: float = 1
) -> Part:
    """Of the matrices a `share` is read; each multiplies `rows_per_matrix` rows on average."""
    flops = 2 * weights.num_products * rows_per_matrix
    ends = weights.num_ends * num_rows * DTYPE.itemsize
    return Part(name, weights.num_bytes * share, flops, ends)


def _attention(paged: Paged, step: Step, num_layers: int) -> Part:
    """Of all layers of one kind, those that read a donor's keys and values included."""
    q_len, context = step.q_len, step.context
    window = paged.attention.window or context
    num_keys = min(context, window + q_len - 1)
    num_pairs = sum(min(n, window) for n in range(context - q_len + 1, context + 1))
    return Part(
        "global attention" if paged.attention.window is None else "local attention",
        num_layers * paged.bytes_of(step.num_seqs * num_keys, 0),
        num_layers * paged.flops_of(step.num_seqs * num_pairs),
        num_layers * paged.bytes_of(0, step.num_tokens),
    )
