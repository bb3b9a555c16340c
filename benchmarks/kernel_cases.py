"""Kernel calls of Gemma's shapes, for `kernels.py` to time: what a case is, and those of
single rows: norms, gates, draws. Attention and experts have files of their own.

A case builds its tensors only when its turn comes. Bytes are those of every input read once and
every result written once, FLOPs those of products that are asked for: what padding, repeated loads
and intermediate results cost is the kernel's affair and lowers its share of the device's peak.

T tokens   D model width   N heads that a projection makes   K head width
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from bezel.engine.model_config import AttentionConfig, ModelConfig
from bezel.kernels.gelu_mul import gelu_mul, gelu_times_reference
from bezel.kernels.kv_pages import gather_kv, write_kv_reference
from bezel.kernels.qkv import (
    QKVShape,
    keys_and_values_reference,
    queries_reference,
    rotate_and_store_global,
    rotate_and_store_local,
)
from bezel.kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from bezel.kernels.rotary import rotary_frequencies, rotary_table
from bezel.kernels.sampling import sample

DTYPE = torch.bfloat16
EPS = 1e-6
VOCAB_SIZE = 262_144
PAGE_SIZE = 16  # tokens, of local pages by default
OTHER_TOKENS = [1, 64, 2048]
BATCHES = [1, 8, 64]
TOP_K, TOP_P = 64, 0.95


@dataclass(frozen=True)
class Work:
    """One call on tensors that are there.

    `error` calls it and says how far the row that is worst off is from the reference, as a share of
    that row's size; of ids, infinity if one differs. `baseline` computes the same with torch.
    """

    run: Callable[[], Any]
    error: Callable[[], float]
    num_bytes: int
    num_flops: int = 0
    baseline: Callable[[], Any] | None = None


class Stock:
    """Random tensors of one device, and an arena that each case cuts into KV pages anew."""

    def __init__(self, device: str, arena_bytes: int) -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator(device).manual_seed(0)
        self.arena_bytes = arena_bytes
        self._arena = self.normal(arena_bytes // DTYPE.itemsize)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x.normal_(0, std, generator=self._generator)

    def weight(self, *shape: int) -> Tensor:
        """Of norms: float32, around 1."""
        return self.normal(*shape, std=0.1, dtype=torch.float32) + 1

    def shuffled(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._generator, device=self.device)

    def pages(self, num_pages: int, parts: int, *shape: int) -> list[Tensor]:
        """Caches of pages of one `shape`; a page's parts, K and V, follow each other."""
        arena = self._arena[: page_bytes(num_pages, parts, *shape) // DTYPE.itemsize]
        return list(arena.view(num_pages, parts, *shape).unbind(1))


def page_bytes(num_pages: int, parts: int, *shape: int) -> int:
    return num_pages * parts * torch.Size(shape).numel() * DTYPE.itemsize


@dataclass(frozen=True)
class Case:
    """A kernel, the models of this shape, and what varies. Its pages take `page_bytes`."""

    kernel: str
    models: str
    sizes: dict[str, int]
    build: Callable[[Stock], Work]
    page_bytes: int = 0


Shape = TypeVar("Shape")


def by_shape(shapes: Iterable[tuple[str, Shape]]) -> dict[Shape, str]:
    """The different shapes, with the models that have them."""
    models: dict[Shape, list[str]] = {}
    for model, shape in shapes:
        models.setdefault(shape, []).append(model)
    return {shape: " ".join(dict.fromkeys(names)) for shape, names in models.items()}


def num_bytes(*tensors: Tensor | None) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def worst_error(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Largest distance of a row, the last dimension, as a share of the expected row's norm."""
    worst = 0.0
    for x, y in zip(actual, expected, strict=True):
        if x is None or y is None or x.numel() == 0:
            assert x is y or (x is not None and y is not None)
            continue
        distances = (x.float() - y.float()).norm(dim=-1)
        # Not a number, for one, is no small distance.
        shares = (distances / y.float().norm(dim=-1).clamp_min(1e-30)).nan_to_num(torch.inf)
        worst = max(worst, shares.max().item())
    return worst


def row_cases(models: dict[str, ModelConfig]) -> Iterator[Case]:
    heads = (
        (name, (attention, model.family == "gemma4"))
        for name, model in models.items()
        for attention in (model.local, model.global_)
    )
    for (attention, has_value_norm), names in by_shape(heads).items():
        kind = "global" if attention.window is None else "local"
        for tokens in OTHER_TOKENS:
            build = partial(qkv, attention=attention, has_norm=has_value_norm, num_tokens=tokens)
            yield Case(f"qkv {kind}", names, {"tokens": tokens}, build)
    widths = ((name, (m.hidden_size, 3 if m.moe else 1)) for name, m in models.items())
    for (width, num_next), names in by_shape(widths).items():
        for tokens in OTHER_TOKENS:
            build = partial(norms, num_tokens=tokens, width=width, num_next=num_next)
            yield Case("add_rms_norm", names, {"tokens": tokens}, build)
    widths = ((name, layer.intermediate_size) for name, m in models.items() for layer in m.layers)
    for width, names in by_shape(widths).items():
        for tokens in OTHER_TOKENS:
            build = partial(gelu, num_tokens=tokens, width=width)
            yield Case("gelu_mul", names, {"tokens": tokens, "width": width}, build)
    for batch in BATCHES:
        for kind in ("greedy", "top-k top-p", "uncut"):
            build = partial(draw, num_seqs=batch, vocab_size=VOCAB_SIZE, kind=kind)
            yield Case(f"sample {kind}", "all", {"batch": batch}, build)


def qkv(stock: Stock, attention: AttentionConfig, has_norm: bool, num_tokens: int) -> Work:
    """Up to 64 tokens as decode steps have them, all stored; more as a chunk has them."""
    packed, dim, heads = attention.key_is_value, attention.head_dim, attention.num_kv_heads
    shape = QKVShape(attention.num_heads, heads, dim, has_norm, packed)
    qkv_TNK = stock.normal(num_tokens, shape.num_heads + (1 if packed else 2) * heads, dim)
    q_weight, k_weight = stock.weight(dim), stock.weight(dim)
    rotary = attention.rotary
    frequencies = rotary_frequencies(rotary.theta, dim, rotary.num_frequencies, rotary.factor)
    positions = torch.arange(num_tokens, device=stock.device)
    cos, sin = rotary_table(positions, frequencies.to(stock.device))
    width = dim + 2 * rotary.num_frequencies if packed else dim
    num_pages = -(-num_tokens // PAGE_SIZE)
    k_cache = stock.normal(num_pages, PAGE_SIZE, heads, width)
    v_cache = None if packed else torch.zeros_like(k_cache)
    slots = stock.shuffled(num_pages * PAGE_SIZE)[:num_tokens]
    turn = (qkv_TNK, shape, EPS, q_weight, k_weight, cos, sin)
    pages = (k_cache, v_cache, slots)
    is_chunk = attention.window is not None and num_tokens > BATCHES[-1]

    def run() -> Sequence[Tensor | None]:
        if attention.window is None:
            return [rotate_and_store_global(*turn, *pages, owns_kv=True)]
        return rotate_and_store_local(*turn, *pages, num_stored=0 if is_chunk else num_tokens)

    def torch_ops() -> list[Tensor | None]:
        k, v = keys_and_values_reference(qkv_TNK, shape, EPS, k_weight, cos, sin)
        if not is_chunk:
            write_kv_reference(k, k_cache, slots)
            if v is not None and v_cache is not None:
                write_kv_reference(v, v_cache, slots)
        return [queries_reference(*turn), k, v]

    def error() -> float:
        q, *new = run()
        if not is_chunk:
            new = [None if cache is None else gather_kv(cache, slots) for cache in pages[:2]]
        exact = (qkv_TNK.float(), *turn[1:])
        k, v = keys_and_values_reference(exact[0], shape, EPS, k_weight, cos, sin)
        return worst_error([q, *new], [queries_reference(*exact), k, v])

    made = num_tokens * (shape.num_heads + heads * (1 if packed else 2)) * width * DTYPE.itemsize
    read = num_bytes(qkv_TNK, q_weight, k_weight, cos, sin, None if is_chunk else slots)
    return Work(run, error, read + made, baseline=torch_ops)


def norms(stock: Stock, num_tokens: int, width: int, num_next: int) -> Work:
    x_TD, residual_TD = stock.normal(num_tokens, width), stock.normal(num_tokens, width)
    weight_D, scalar_1 = stock.weight(width), stock.normal(1)
    next_ND = stock.weight(num_next, width)
    rest = (EPS, scalar_1, next_ND)
    run = partial(add_rms_norm, x_TD, weight_D, residual_TD, *rest)

    def error() -> float:
        expected = add_rms_norm_reference(x_TD.float(), weight_D, residual_TD.float(), *rest)
        return worst_error(run(), expected)

    made = (1 + num_next) * x_TD.nbytes
    read = num_bytes(x_TD, weight_D, residual_TD, scalar_1, next_ND)
    baseline = partial(add_rms_norm_reference, x_TD, weight_D, residual_TD, *rest)
    return Work(run, error, read + made, baseline=baseline)


def gelu(stock: Stock, num_tokens: int, width: int) -> Work:
    gate_up = stock.normal(num_tokens, 2 * width)
    run = partial(gelu_mul, gate_up)

    def error() -> float:
        return worst_error([run()], [gelu_times_reference(*gate_up.float().chunk(2, -1))])

    def torch_ops() -> Tensor:
        return gelu_times_reference(*gate_up.chunk(2, -1))

    return Work(run, error, gate_up.nbytes + gate_up.nbytes // 2, baseline=torch_ops)


def draw(stock: Stock, num_seqs: int, vocab_size: int, kind: str) -> Work:
    logits = stock.normal(num_seqs, vocab_size, std=3.0, dtype=torch.float32)
    temperature = 0.0 if kind == "greedy" else 1.0
    top_k, top_p = (TOP_K, TOP_P) if kind == "top-k top-p" else (0, 1.0)
    columns = ([temperature], [top_k], [top_p], [0.0], [7], [1000])
    parameters = [column * num_seqs for column in columns]
    expected = sample(logits.cpu(), *parameters)
    run = partial(sample, logits, *parameters)

    def torch_ops() -> Tensor:
        if kind == "greedy":
            return logits.argmax(-1)
        if kind == "uncut":
            return logits.softmax(-1).multinomial(1)
        values, ids = logits.topk(TOP_K)
        probabilities = values.softmax(-1)
        is_cut = probabilities.cumsum(-1) - probabilities >= TOP_P
        return ids.gather(1, probabilities.masked_fill(is_cut, 0).multinomial(1))

    def error() -> float:
        return 0.0 if torch.equal(run().cpu(), expected) else float("inf")

    return Work(run, error, logits.nbytes + 8 * num_seqs, baseline=torch_ops)
