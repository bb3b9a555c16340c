"""`moe_checkpoint` writes what the model needs, and `moe_decode` counts what a step reads."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import moe_checkpoint
import moe_decode
from decoding import Decoding, build_engine

from bezel.engine.core import Engine
from bezel.engine.gguf_tensors import hf_tensor_name
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import build_model
from bezel.engine.planning.published import PUBLISHED
from bezel.kernels.cpu.jit import plain_torch

SMALL = PUBLISHED[moe_checkpoint.MODEL] | {
    "num_hidden_layers": 6,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_experts": 16,
    "top_k_experts": 3,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """torch computes, as compiling kernels for this model would take longer."""
    path = tmp_path_factory.mktemp("experts") / "small.gguf"
    moe_checkpoint.write(path, ModelConfig.from_hf(SMALL))
    with plain_torch():
        return build_engine("float32", str(path), max_num_seqs=8, kv_cache_memory_bytes=1 << 24)


@pytest.mark.parametrize("num_layers", [2, 30])
def test_every_value_of_the_published_model_is_written(num_layers: int) -> None:
    config = moe_checkpoint.shape(num_layers)
    model = build_model(config, torch.bfloat16, torch.device("meta"))
    tensors = list(moe_checkpoint.tensors(config))
    assert all(hf_tensor_name(name) for name, _, _ in tensors)
    num_values = sum(torch.Size(shape).numel() for _, shape, _ in tensors)
    assert num_values == sum(parameter.numel() for parameter in model.parameters())
    if num_layers == 30:
        total = sum(moe_checkpoint.num_bytes(shape, kind) for _, shape, kind in tensors)
        assert config == ModelConfig.from_hf(PUBLISHED[moe_checkpoint.MODEL])
        assert round(total / 1e9, 1) == 14.4


def test_bytes_of_a_step(engine: Engine) -> None:
    always, of_experts = moe_decode.weight_bytes(engine)
    assert of_experts == 6 * 3 * 32 * 256 * 4
    parameters = engine.runner.model.parameters()
    assert always + 16 * of_experts == sum(p.numel() * p.itemsize for p in parameters)


def test_experts_of_a_step(engine: Engine) -> None:
    """Of one sequence the model's three in each layer; of eight, more, but not all sixteen."""
    with plain_torch():
        batch = Decoding(engine)
        batch.fill(1, 20)
        assert moe_decode.count_experts(batch) == 3
        batch.empty()
        batch.fill(8, 20)
        assert 3 < moe_decode.count_experts(batch) < 16
        batch.empty()
