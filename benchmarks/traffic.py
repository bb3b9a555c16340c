"""Bytes that kernels move and products they compute, counted: `make kernels-traffic`.

Every load and store of the real kernels, with the tiles of an H100 and the widths of the published
models, goes through the interpreter of the kernel tests, which counts them. *Minimum* is every
input value that is used once plus every final output value once; what one kernel of an operation
passes to the next (parts of a split, hidden rows of experts) is not in it. Caches don't exist here:
a weight that two programs read counts twice, though the second may find it in the L2 cache.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from simulator.watch import watched
from torch import Tensor

from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.embedding import embed_and_norm
from bezel.kernels.gelu_mul import gelu_mul
from bezel.kernels.jit import triton_on_cpu
from bezel.kernels.moe_combine import combine_experts
from bezel.kernels.moe_mlp import moe_mlp
from bezel.kernels.moe_route import route
from bezel.kernels.prefill_attention import global_prefill_attention, local_prefill_attention
from bezel.kernels.qkv import QKVShape, rotate_and_store_global, rotate_and_store_local
from bezel.kernels.rms_norm import add_rms_norm

DTYPE = torch.bfloat16
LOCAL_DIM, GLOBAL_DIM, PAIRS, GLOBAL_PAIRS = 256, 512, 128, 64
LOCAL_PAGE, GLOBAL_PAGE = 16, 64
Compute = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Heads, widths and window of a published model."""

    hidden: int
    num_heads: int
    local_kv_heads: int
    global_kv_heads: int
    window: int
    is_packed: bool
    mlp: int


SHAPES = {
    "E2B": Shape(1536, 8, 1, 1, 512, False, 6144),
    "E4B": Shape(2560, 8, 2, 2, 512, False, 10_240),
    "12B": Shape(3840, 16, 8, 1, 1024, True, 15_360),
    "26B-A4B": Shape(2816, 16, 8, 2, 1024, True, 2112),
    "31B": Shape(5376, 32, 16, 4, 1024, True, 21_504),
}
NUM_EXPERTS, TOP_K, EXPERT_WIDTH = 128, 8, 704


@dataclass(frozen=True)
class Count:
    """What one operation did. `flops` are those of its matrix products, padding included."""

    num_bytes: int
    minimum: int
    flops: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.num_bytes / self.minimum


def count(compute: Compute) -> Count:
    """Run an operation's kernels under the interpreter and count."""
    started = time.monotonic()
    with triton_on_cpu("sm_90"), watched() as watch:
        compute()
    return Count(
        watch.bytes_loaded + watch.bytes_stored,
        watch.minimum_bytes,
        watch.dot_flops,
        time.monotonic() - started,
    )


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPE)


def pages(num_tokens: int, page_size: int, num_kv_heads: int, width: int) -> tuple[Tensor, Tensor]:
    """One sequence's cache, and its table of pages in another order than they lie."""
    num_pages = -(-num_tokens // page_size)
    table_1P = torch.randperm(num_pages)[None]
    return random(num_pages, page_size, num_kv_heads, width), table_1P


def decode(shape: Shape, context: int, is_local: bool, q_len: int = 1) -> Compute:
    """One sequence of `context` tokens."""
    kv_heads = shape.local_kv_heads if is_local else shape.global_kv_heads
    value_dim = LOCAL_DIM if is_local else GLOBAL_DIM
    is_packed = shape.is_packed and not is_local
    width = value_dim + 2 * GLOBAL_PAIRS if is_packed else value_dim
    page_size = LOCAL_PAGE if is_local else GLOBAL_PAGE
    k_cache, table = pages(context, page_size, kv_heads, width)
    v_cache = None if is_packed else random(*k_cache.shape)
    q = random(q_len, shape.num_heads, width)
    window = shape.window if is_local else None
    lengths = torch.tensor([context])
    return lambda: decode_attention(
        q, k_cache, v_cache, table, lengths, 1.0, window, value_dim, q_len
    )


def prefill(shape: Shape, start: int, num_tokens: int, is_local: bool) -> Compute:
    """A chunk of one sequence after `start` tokens."""
    end = start + num_tokens
    offsets, lengths = torch.tensor([0, num_tokens]), torch.tensor([end])
    if is_local:
        heads = (shape.local_kv_heads, LOCAL_DIM)
        k_cache, table = pages(end, LOCAL_PAGE, *heads)
        v_cache, q = random(*k_cache.shape), random(num_tokens, shape.num_heads, LOCAL_DIM)
        k, v = random(num_tokens, *heads), random(num_tokens, *heads)
        return lambda: local_prefill_attention(
            q, k, v, k_cache, v_cache, table, offsets, lengths, num_tokens, 1.0, shape.window
        )
    width = GLOBAL_DIM + 2 * GLOBAL_PAIRS if shape.is_packed else GLOBAL_DIM
    k_cache, table = pages(end, GLOBAL_PAGE, shape.global_kv_heads, width)
    values = None if shape.is_packed else random(*k_cache.shape)
    q = random(num_tokens, shape.num_heads, width)
    return lambda: global_prefill_attention(
        q, k_cache, values, table, offsets, lengths, num_tokens, 1.0, GLOBAL_DIM
    )


def qkv(shape: Shape, num_tokens: int, is_local: bool) -> Compute:
    """Norms, RoPE and the cache write of `num_tokens` decodes."""
    heads = (shape.num_heads, shape.local_kv_heads if is_local else shape.global_kv_heads)
    dim, pairs = (LOCAL_DIM, PAIRS) if is_local else (GLOBAL_DIM, GLOBAL_PAIRS)
    is_packed = shape.is_packed and not is_local
    layout = QKVShape(*heads, dim, has_value_norm=True, key_is_value=is_packed)
    rows = random(num_tokens, heads[0] + (1 if is_packed else 2) * heads[1], dim)
    width = dim + 2 * pairs if is_packed else dim
    k_cache = random(-(-num_tokens // LOCAL_PAGE), LOCAL_PAGE, heads[1], width)
    v_cache = None if is_packed else random(*k_cache.shape)
    weights = torch.ones(dim), torch.ones(dim)
    cos_sin = torch.ones(num_tokens, pairs), torch.ones(num_tokens, pairs)
    slots = torch.randperm(num_tokens)
    if is_local:
        return lambda: rotate_and_store_local(
            rows, layout, 1e-6, *weights, *cos_sin, k_cache, v_cache, slots, num_tokens
        )
    return lambda: rotate_and_store_global(
        rows, layout, 1e-6, *weights, *cos_sin, k_cache, v_cache, slots, True
    )


def norm(shape: Shape, num_tokens: int) -> Compute:
    x, residual = random(num_tokens, shape.hidden), random(num_tokens, shape.hidden)
    weight, scalar = torch.ones(shape.hidden), torch.ones(1, dtype=DTYPE)
    return lambda: add_rms_norm(x, weight, residual, 1e-6, scalar, weight[None] * 2)


def gelu(shape: Shape, num_tokens: int) -> Compute:
    gate_up = random(num_tokens, 2 * shape.mlp)
    return lambda: gelu_mul(gate_up)


def embedding(shape: Shape, num_tokens: int) -> Compute:
    table, ids = random(1000, shape.hidden), torch.randint(0, 1000, (num_tokens,))
    return lambda: embed_and_norm(ids, table, 2.0, torch.ones(shape.hidden), 1e-6)


def experts(shape: Shape, num_tokens: int) -> Compute:
    """26B-A4B's experts with uniformly random routing; the dense MLP beside them if it is few."""
    D, F, E = shape.hidden, EXPERT_WIDTH, NUM_EXPERTS
    chosen = torch.rand(num_tokens, E).topk(TOP_K).indices.int()
    weights = torch.empty(E, 2 * F, D, dtype=DTYPE), torch.empty(E, D, F, dtype=DTYPE)
    for expert in chosen.unique().tolist():  # the others' memory is never touched
        weights[0][expert], weights[1][expert] = 0.01, 0.01
    dense = (random(2 * shape.mlp, D), random(D, shape.mlp)) if num_tokens <= 64 else (None, None)
    x, x_dense = random(num_tokens, D), random(num_tokens, D)
    return lambda: moe_mlp(x, x_dense if dense[0] is not None else None, chosen, *weights, *dense)


def routing(num_tokens: int) -> Compute:
    scores, scales = random(num_tokens, NUM_EXPERTS), torch.ones(NUM_EXPERTS, dtype=DTYPE)
    return lambda: route(scores, scales, TOP_K)


def combination(shape: Shape, num_tokens: int) -> Compute:
    rows = random(num_tokens, TOP_K + 3, shape.hidden)
    weights, w = torch.rand(num_tokens, TOP_K), torch.ones(shape.hidden)
    residual, scalar = random(num_tokens, shape.hidden), torch.ones(1, dtype=DTYPE)
    return lambda: combine_experts(
        rows, weights, None, w, w * 2, w * 3, residual, 1e-6, scalar, w * 4
    )


def cases() -> dict[str, dict[str, Compute]]:
    """Operations by kernel, then by model and size."""
    moe = SHAPES["26B-A4B"]
    attention = [(name, shape, is_local) for name, shape in SHAPES.items() for is_local in (1, 0)]
    kind = {1: "local", 0: "global"}
    return {
        "decode attention, 8,192 tokens": {
            f"{name}, {kind[local]}": decode(shape, 8192, bool(local))
            for name, shape, local in attention
        },
        "verifying 4 tokens, 8,192 tokens": {
            f"26B-A4B, {kind[local]}": decode(moe, 8192, bool(local), q_len=4) for local in (1, 0)
        },
        "prefill attention, 256 tokens after 2,048": {
            f"{name}, {kind[local]}": prefill(shape, 2048, 256, bool(local))
            for name, shape, local in attention
            if name in ("E4B", "26B-A4B")
        },
        "experts": {f"26B-A4B, {n} tokens": experts(moe, n) for n in (1, 4, 16, 64)},
        "routing": {f"26B-A4B, {n} tokens": routing(n) for n in (1, 64)},
        "combination of experts and norms": {"26B-A4B, 16 tokens": combination(moe, 16)},
        "norms, RoPE and cache write, 16 tokens": {
            f"{name}, {kind[local]}": qkv(shape, 16, bool(local))
            for name, shape, local in attention
        },
        "sum, norm and next norm, 16 tokens": {n: norm(s, 16) for n, s in SHAPES.items()},
        "gated GELU, 16 tokens": {name: gelu(shape, 16) for name, shape in SHAPES.items()},
        "embedding and norm, 16 tokens": {n: embedding(s, 16) for n, s in SHAPES.items()},
    }


def main() -> None:
    torch.manual_seed(0)
    print("| kernel | model | MB moved | minimum | ratio | GFLOP |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for kernel, by_model in cases().items():
        for model, compute in by_model.items():
            c = count(compute)
            print(
                f"| {kernel} | {model} | {c.num_bytes / 1e6:,.3f} | {c.minimum / 1e6:,.3f} "
                f"| {c.ratio:.3f} | {c.flops / 1e9:,.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
