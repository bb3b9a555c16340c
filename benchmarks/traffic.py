"""Bytes that kernels move and products they compute, counted: `make kernels-traffic`.

Every load and store of the real kernels, with the tiles of an H100 and the widths of the published
models, goes through the interpreter of the kernel tests, which counts them. *Minimum* is every
input value that is used once plus every final output value once; what one kernel of an operation
passes to the next (parts of a split, hidden rows of experts) is not in it. Caches don't exist here:
what two programs read counts twice, though the second may find it in the L2 cache. For prefill the
minimum is that of its blocks: each block of queries reads the keys and values it sees once.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from bezel.kernels.prefill_kernels import prefill_tile
from bezel.kernels.qkv import QKVShape, rotate_and_store_global, rotate_and_store_local
from bezel.kernels.rms_norm import add_rms_norm

DTYPE = torch.bfloat16
LOCAL_DIM, GLOBAL_DIM, PAIRS, GLOBAL_PAIRS = 256, 512, 128, 64
LOCAL_PAGE, GLOBAL_PAGE = 16, 64
BYTES = 2
ARCHITECTURE = "sm_90"


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
DECODE, VERIFY = "decode attention, 8K tokens", "verifying 4 tokens after 8K"
PREFILL = "prefill attention, 256 tokens after 2K"
NUM_EXPERTS, TOP_K, EXPERT_WIDTH = 128, 8, 704


@dataclass(frozen=True)
class Case:
    """An operation, and bytes of its minimum that the interpreter doesn't know of: of tensors too
    large to be tracked, and what blocks of queries have to read again."""

    compute: Callable[[], object]
    further_minimum: int = 0


@dataclass(frozen=True)
class Count:
    """What one operation did. `flops` are those of its matrix products, padding included."""

    num_bytes: int
    minimum: int
    flops: int

    @property
    def ratio(self) -> float:
        return self.num_bytes / self.minimum


def count(case: Case) -> Count:
    """Run an operation's kernels under the interpreter and count."""
    with triton_on_cpu(ARCHITECTURE), watched() as watch:
        case.compute()
    num_bytes = watch.bytes_loaded + watch.bytes_stored
    return Count(num_bytes, watch.minimum_bytes + case.further_minimum, watch.dot_flops)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPE)


def pages(num_tokens: int, page_size: int, num_kv_heads: int, width: int) -> tuple[Tensor, Tensor]:
    """One sequence's cache, and its table of pages in another order than they lie."""
    num_pages = -(-num_tokens // page_size)
    table_1P = torch.randperm(num_pages)[None]
    return random(num_pages, page_size, num_kv_heads, width), table_1P


def decode(shape: Shape, context: int, is_local: bool, q_len: int = 1) -> Case:
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
    return Case(
        lambda: decode_attention(q, k_cache, v_cache, table, lengths, 1.0, window, value_dim, q_len)
    )


def prefill(shape: Shape, start: int, num_tokens: int, is_local: bool) -> Case:
    """A chunk of one sequence after `start` tokens."""
    end = start + num_tokens
    offsets, lengths = torch.tensor([0, num_tokens]), torch.tensor([end])
    if is_local:
        heads = (shape.local_kv_heads, LOCAL_DIM)
        k_cache, table = pages(end, LOCAL_PAGE, *heads)
        v_cache, q = random(*k_cache.shape), random(num_tokens, shape.num_heads, LOCAL_DIM)
        k, v = random(num_tokens, *heads), random(num_tokens, *heads)
        return Case(
            lambda: local_prefill_attention(
                q, k, v, k_cache, v_cache, table, offsets, lengths, num_tokens, 1.0, shape.window
            ),
            _rereads(shape, start, num_tokens, q, shape.window),
        )
    width = GLOBAL_DIM + 2 * GLOBAL_PAIRS if shape.is_packed else GLOBAL_DIM
    k_cache, table = pages(end, GLOBAL_PAGE, shape.global_kv_heads, width)
    values = None if shape.is_packed else random(*k_cache.shape)
    q = random(num_tokens, shape.num_heads, width)
    return Case(
        lambda: global_prefill_attention(
            q, k_cache, values, table, offsets, lengths, num_tokens, 1.0, GLOBAL_DIM
        ),
        _rereads(shape, start, num_tokens, q, None),
    )


def _rereads(shape: Shape, start: int, num_tokens: int, q: Tensor, window: int | None) -> int:
    """Bytes of keys and values that blocks of queries see beyond what all of them see together."""
    is_packed = shape.is_packed and window is None
    with triton_on_cpu(ARCHITECTURE):
        rows = prefill_tile(q, is_packed).rows
    kv_heads = shape.global_kv_heads if window is None else shape.local_kv_heads
    block = rows * kv_heads // shape.num_heads
    reach = start + num_tokens if window is None else window
    ends = range(start + block, start + num_tokens + block, block)
    seen = sum(end - max(0, end - block - reach + 1) for end in ends)
    together = start + num_tokens - max(0, start - reach + 1)
    values = GLOBAL_DIM + 2 * GLOBAL_PAIRS if is_packed else 2 * q.shape[2]
    return (seen - together) * kv_heads * values * BYTES


def qkv(shape: Shape, num_tokens: int, is_local: bool) -> Case:
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
        return Case(
            lambda: rotate_and_store_local(
                rows, layout, 1e-6, *weights, *cos_sin, k_cache, v_cache, slots, num_tokens
            )
        )
    return Case(
        lambda: rotate_and_store_global(
            rows, layout, 1e-6, *weights, *cos_sin, k_cache, v_cache, slots, True
        )
    )


def norm(shape: Shape, num_tokens: int) -> Case:
    x, residual = random(num_tokens, shape.hidden), random(num_tokens, shape.hidden)
    weight, scalar = torch.ones(shape.hidden), torch.ones(1, dtype=DTYPE)
    return Case(lambda: add_rms_norm(x, weight, residual, 1e-6, scalar, weight[None] * 2))


def gelu(shape: Shape, num_tokens: int) -> Case:
    gate_up = random(num_tokens, 2 * shape.mlp)
    return Case(lambda: gelu_mul(gate_up))


def embedding(shape: Shape, num_tokens: int) -> Case:
    table, ids = random(1000, shape.hidden), torch.randint(0, 1000, (num_tokens,))
    return Case(lambda: embed_and_norm(ids, table, 2.0, torch.ones(shape.hidden), 1e-6))


def experts(shape: Shape, num_tokens: int) -> Case:
    """26B-A4B's experts with uniformly random routing; the dense MLP beside them if it is few."""
    D, F, E = shape.hidden, EXPERT_WIDTH, NUM_EXPERTS
    chosen = torch.rand(num_tokens, E).topk(TOP_K).indices.int()
    weights = torch.empty(E, 2 * F, D, dtype=DTYPE), torch.empty(E, D, F, dtype=DTYPE)
    for expert in chosen.unique().tolist():  # the others' memory is never touched
        weights[0][expert], weights[1][expert] = 0.01, 0.01
    dense = (random(2 * shape.mlp, D), random(D, shape.mlp)) if num_tokens <= 64 else (None, None)
    x, x_dense = random(num_tokens, D), random(num_tokens, D)
    used_bytes = len(chosen.unique()) * 3 * F * D * BYTES
    return Case(
        lambda: moe_mlp(x, None if dense[0] is None else x_dense, chosen, *weights, *dense),
        used_bytes,
    )


def routing(num_tokens: int) -> Case:
    scores, scales = random(num_tokens, NUM_EXPERTS), torch.ones(NUM_EXPERTS, dtype=DTYPE)
    return Case(lambda: route(scores, scales, TOP_K))


def combination(shape: Shape, num_tokens: int) -> Case:
    rows = random(num_tokens, TOP_K + 3, shape.hidden)
    weights, w = torch.rand(num_tokens, TOP_K), torch.ones(shape.hidden)
    residual, scalar = random(num_tokens, shape.hidden), torch.ones(1, dtype=DTYPE)
    return Case(
        lambda: combine_experts(rows, weights, None, w, w * 2, w * 3, residual, 1e-6, scalar, w * 4)
    )


def cases() -> Iterator[tuple[str, str, Callable[[], Case]]]:
    """Operation, model and size, and what builds the case."""
    moe, kinds = SHAPES["26B-A4B"], (("local", True), ("global", False))
    for name, shape in SHAPES.items():
        for kind, is_local in kinds:
            yield DECODE, f"{name}, {kind}", partial(decode, shape, 8192, is_local)
    for kind, is_local in kinds:
        yield DECODE, f"26B-A4B, {kind}, 64K", partial(decode, moe, 65_536, is_local)
        yield VERIFY, f"26B-A4B, {kind}", partial(decode, moe, 8192, is_local, q_len=4)
    for name in ("E4B", "26B-A4B"):
        for kind, is_local in kinds:
            yield PREFILL, f"{name}, {kind}", partial(prefill, SHAPES[name], 2048, 256, is_local)
    for num_tokens in (1, 4, 16, 64):
        yield "experts", f"26B-A4B, {num_tokens} tokens", partial(experts, moe, num_tokens)
    yield "routing", "26B-A4B, 64 tokens", partial(routing, 64)
    yield "joining experts, norms", "26B-A4B, 16 tokens", partial(combination, moe, 16)
    for name, shape in SHAPES.items():
        for kind, is_local in kinds:
            yield "norms, RoPE, cache write", f"{name}, {kind}", partial(qkv, shape, 16, is_local)
    for operation, build in (
        ("sum, norm, next norm", norm),
        ("gated GELU", gelu),
        ("embedding, norm", embedding),
    ):
        for name, shape in SHAPES.items():
            yield operation, f"{name}, 16 tokens", partial(build, shape, 16)


def main() -> None:
    """Print a table; an argument picks the rows that contain it."""
    torch.manual_seed(0)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    print("| Operation | Model | MB moved | Minimum | Ratio | GFLOP |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for operation, model, build in cases():
        if wanted in f"{operation} {model}":
            c = count(build())
            megabytes = f"{c.num_bytes / 1e6:,.3f} | {c.minimum / 1e6:,.3f}"
            flops = f"{c.flops / 1e9:,.3f}"
            print(f"| {operation} | {model} | {megabytes} | {c.ratio:.3f} | {flops} |", flush=True)


if __name__ == "__main__":
    main()
