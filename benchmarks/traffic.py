"""Bytes that kernels move and products they compute, counted: `python benchmarks/traffic.py`.

The cases of `kernels.py`, with the tiles of an H100, go through the simulator of the kernel tests,
which counts each load and store. *Minimum* is every input read once and every result written once,
and for prefill what its blocks can't avoid: each reads the keys and values that it sees. There
are no caches: what two programs read counts twice, though the second may find it in the L2 cache.
GFLOP are those computed, useful those asked for. An argument picks the rows that contain it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import attention_cases
import expert_cases
import kernel_cases
import torch
from aot.launches import CONFIGS
from attention_cases import Paged, paged_shapes
from kernel_cases import DTYPE, Stock, Work
from simulator.watch import watched

from bezel.engine.model_config import ModelConfig
from bezel.kernels.jit import triton_on_cpu
from bezel.kernels.prefill_kernels import prefill_tile

ARENA_BYTES = 512 << 20
CONTEXT, LONG_CONTEXT = 8192, 65_536
CHUNK, CHUNK_CONTEXT = 256, 2048
NUM_TOKENS = 16
Build = Callable[[Stock], Work]


def rereads(paged: Paged) -> int:
    """Bytes of keys and values that the blocks of a chunk see beyond what they see together."""
    attention, window = paged.attention, paged.attention.window
    parts, _, num_kv_heads, width = paged.page_shape
    q_THC = torch.empty(0, attention.num_heads, paged.width, dtype=DTYPE)
    rows = prefill_tile(q_THC, attention.key_is_value).rows
    block = rows * num_kv_heads // attention.num_heads
    seen = 0
    for first in range(CHUNK_CONTEXT, CHUNK_CONTEXT + CHUNK, block):
        seen += first + block - (max(0, first - window + 1) if window else 0)
    end = CHUNK_CONTEXT + CHUNK
    together = end - (max(0, CHUNK_CONTEXT - window + 1) if window else 0)
    return (seen - together) * num_kv_heads * parts * width * DTYPE.itemsize


def attention(models: dict[str, ModelConfig]) -> Iterator[tuple[str, str, Build, int]]:
    """Operation, models, what builds the case, and what to add to its minimum."""
    for paged, names in kernel_cases.by_shape(paged_shapes(models)).items():
        is_local = paged.attention.window is not None
        kind = "local" if is_local else "global"
        decode = partial(attention_cases.decode, paged=paged, batch=1)
        prefill = attention_cases.prefill_local if is_local else attention_cases.prefill_global
        chunk = partial(prefill, paged=paged, context=CHUNK_CONTEXT, num_tokens=CHUNK)
        yield f"decode {kind}, 8K", names, partial(decode, context=CONTEXT, q_len=1), 0
        if not is_local:
            yield f"decode {kind}, 64K", names, partial(decode, context=LONG_CONTEXT, q_len=1), 0
        yield f"verify 4 {kind}, 8K", names, partial(decode, context=CONTEXT, q_len=4), 0
        yield f"prefill {kind}, 256 after 2K", names, chunk, rereads(paged)


def others(models: dict[str, ModelConfig]) -> Iterator[tuple[str, str, Build, int]]:
    for case in expert_cases.expert_cases(models):
        if case.sizes["tokens"] <= 64:
            yield f"{case.kernel}, {case.sizes['tokens']} tokens", case.models, case.build, 0
    for paged, names in kernel_cases.by_shape(paged_shapes(models)).items():
        kind = "global" if paged.attention.window is None else "local"
        build = partial(
            kernel_cases.qkv, attention=paged.attention, has_norm=True, num_tokens=NUM_TOKENS
        )
        yield f"qkv {kind}, 16 tokens", names, build, 0
    for name, model in models.items():
        rows = {"num_tokens": NUM_TOKENS, "width": model.hidden_size, "num_next": 1}
        yield "add_rms_norm, 16 tokens", name, partial(kernel_cases.norms, **rows), 0
    for kind in ("greedy", "top-k top-p", "uncut"):
        rows = {"num_seqs": 1, "vocab_size": kernel_cases.VOCAB_SIZE, "kind": kind}
        yield f"sample {kind}, 1 row", "all", partial(kernel_cases.draw, **rows), 0


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    models = {
        name: ModelConfig.from_hf(config) for name, config in CONFIGS.items() if name != "270M"
    }
    print("| Operation | Models | MB moved | Minimum | Ratio | GFLOP | Useful |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with torch.inference_mode(), triton_on_cpu():
        stock = Stock("cpu", ARENA_BYTES)
        for operation, names, build, further_bytes in (*attention(models), *others(models)):
            if wanted not in f"{operation} {names}":
                continue
            work = build(stock)
            with watched() as watch:
                work.run()
            moved = (watch.bytes_loaded + watch.bytes_stored) / 1e6
            minimum = (work.num_bytes + further_bytes) / 1e6
            flops = f"{watch.dot_flops / 1e9:,.3f} | {work.num_flops / 1e9:,.3f}"
            ratio = f"{moved:,.3f} | {minimum:,.3f} | {moved / minimum:.3f}"
            print(f"| {operation} | {names} | {ratio} | {flops} |", flush=True)


if __name__ == "__main__":
    main()
