"""A checkpoint of Gemma 4 26B-A4B's shape: `python benchmarks/moe_checkpoint.py FILE [--layers N]`.

The weights are random, for measuring loading and speed: a GGUF in Q4_0, the embeddings in Q6_K, of
14.4 GB with all 30 layers. It has no vocabulary, so engines can run it but `bezel serve` can't.
Tensors are written one after the other from a small pool of random blocks, in little memory.
"""

import argparse
from collections.abc import Iterator
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from bezel.engine.model_config import ModelConfig, MoEConfig
from bezel.engine.planning.published import PUBLISHED

MODEL = "gemma-4-26B-A4B"
POOL_BLOCKS = {Kind.Q4_0: 1 << 22, Kind.Q6_K: 1 << 18}
WEIGHT_STD = 0.018  # about D^-½, which keeps activations as large as they come
_CODE_STD = {Kind.Q4_0: 4.6, Kind.Q6_K: 18.5 * 16}  # of q − 8; of s · (q − 32), s up to 28
NORMS = (
    "attn_norm",
    "post_attention_norm",
    "ffn_norm",
    "post_ffw_norm",
    "pre_ffw_norm_2",
    "post_ffw_norm_1",
    "post_ffw_norm_2",
)

Tensor = tuple[str, tuple[int, ...], Kind]


def shape(num_layers: int) -> ModelConfig:
    """The published one, cut to its first layers; the last one is always global."""
    config = PUBLISHED[MODEL] | {"num_hidden_layers": num_layers}
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(30)]
    kinds[num_layers - 1] = "full_attention"
    return ModelConfig.from_hf(config | {"layer_types": kinds[:num_layers]})


def tensors(model: ModelConfig) -> Iterator[Tensor]:
    """GGUF name, shape with rows first, type."""
    dim = model.hidden_size
    yield "token_embd.weight", (model.vocab_size, dim), Kind.Q6_K
    yield "output_norm.weight", (dim,), Kind.F32
    for layer in model.layers:
        attention = model.attention(layer)
        q, kv = (n * attention.head_dim for n in (attention.num_heads, attention.num_kv_heads))
        matrices = {
            "attn_q": (q, dim),
            "attn_k": (kv, dim),
            "attn_v": (kv, dim),
            "attn_output": (dim, q),
            "ffn_gate": (layer.intermediate_size, dim),
            "ffn_up": (layer.intermediate_size, dim),
            "ffn_down": (dim, layer.intermediate_size),
        }
        if attention.key_is_value:
            del matrices["attn_v"]
        for name, rows_columns in matrices.items():
            yield f"blk.{layer.index}.{name}.weight", rows_columns, Kind.Q4_0
        vectors = dict.fromkeys(NORMS, dim)
        vectors |= {"attn_q_norm": attention.head_dim, "attn_k_norm": attention.head_dim}
        for name, width in vectors.items():
            yield f"blk.{layer.index}.{name}.weight", (width,), Kind.F32
        yield f"blk.{layer.index}.layer_output_scale.weight", (1,), Kind.F32
        assert model.moe is not None
        yield from _experts(f"blk.{layer.index}", dim, model.moe)


def _experts(layer: str, dim: int, moe: MoEConfig) -> Iterator[Tensor]:
    num, width = moe.num_experts, moe.intermediate_size
    yield f"{layer}.ffn_gate_inp.weight", (num, dim), Kind.F32
    yield f"{layer}.ffn_gate_inp.scale", (dim,), Kind.F32
    yield f"{layer}.ffn_gate_up_exps.weight", (num, 2 * width, dim), Kind.Q4_0
    yield f"{layer}.ffn_down_exps.weight", (num, dim, width), Kind.Q4_0
    yield f"{layer}.ffn_down_exps.scale", (num,), Kind.F32


def num_bytes(rows_columns: tuple[int, ...], kind: Kind) -> int:
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return prod(rows_columns) // block_values * block_bytes


def write(path: Path, model: ModelConfig, seed: int = 0) -> None:
    """A checkpoint of a Gemma 4 with experts; its widths are multiples of 256, experts' of 32."""
    writer = gguf.GGUFWriter(str(path), "gemma4")
    _add_metadata(writer, model)
    parts = list(tensors(model))
    for name, rows_columns, kind in parts:
        is_float = kind is Kind.F32
        stored = rows_columns if is_float else gguf.quant_shape_to_byte_shape(rows_columns, kind)
        dtype = np.dtype(np.float32 if is_float else np.uint8)
        writer.add_tensor_info(name, stored, dtype, num_bytes(rows_columns, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    pools = {kind: _blocks(kind, count, rng) for kind, count in POOL_BLOCKS.items()}
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for name, rows_columns, kind in parts:
        size = num_bytes(rows_columns, kind)
        if kind is Kind.F32:
            file.write(_values(name, rows_columns, rng).tobytes())
        else:
            for piece in _pieces(pools[kind], gguf.GGML_QUANT_SIZES[kind][1], size, rng):
                file.write(piece)
        writer.write_padding(file, size)
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, model: ModelConfig) -> None:
    local, global_, moe = model.local, model.global_, model.moe
    assert moe is not None and local.window is not None
    writer.add_name(f"{MODEL} with random weights")
    writer.add_block_count(len(model.layers))
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.layers[0].intermediate_size)
    writer.add_head_count(local.num_heads)
    writer.add_head_count_kv([model.attention(layer).num_kv_heads for layer in model.layers])
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_key_length(global_.head_dim)
    writer.add_value_length(global_.head_dim)
    writer.add_key_length_swa(local.head_dim)
    writer.add_value_length_swa(local.head_dim)
    writer.add_sliding_window(local.window)
    writer.add_sliding_window_pattern([layer.is_local for layer in model.layers])
    writer.add_final_logit_softcapping(model.final_logit_softcapping or 0.0)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_feed_forward_length(moe.intermediate_size)


def _blocks(kind: Kind, count: int, rng: np.random.Generator) -> memoryview:
    """Random codes, and scales that give weights a standard deviation of WEIGHT_STD.

    Scales have either sign, as codes are not symmetric: with weights whose mean isn't zero all
    tokens would come to look alike, and to choose the same experts.
    """
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    signs = rng.choice(np.array([-1, 1], np.float16), count)
    scales = (signs * np.float16(WEIGHT_STD / _CODE_STD[kind])).view(np.uint8)
    if kind is Kind.Q4_0:
        blocks[:, :2] = scales.reshape(-1, 2)
    else:
        blocks[:, 192:208] = rng.integers(4, 28, (count, 16), dtype=np.uint8)
        blocks[:, 208:] = scales.reshape(-1, 2)
    return memoryview(blocks).cast("B")


def _pieces(
    pool: memoryview, block_bytes: int, size: int, rng: np.random.Generator
) -> Iterator[memoryview]:
    """`size` bytes of the pool, from a random block on and around again."""
    start = int(rng.integers(len(pool) // block_bytes)) * block_bytes
    while size:
        piece = pool[start : start + size]
        yield piece
        size, start = size - len(piece), 0


def _values(
    name: str, rows_columns: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if name.endswith("ffn_gate_inp.weight"):
        return rng.standard_normal(rows_columns, np.float32)
    return np.full(rows_columns, 0.7 if "layer_output_scale" in name else 1.0, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=30, help="30 by default, at least 2")
    arguments = parser.parse_args()
    write(arguments.file, shape(arguments.layers))
    print(f"{arguments.file}: {arguments.file.stat().st_size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
