"""Fixtures for tests of more than one layer."""

import os
from pathlib import Path

# As `bezel serve` does, before torch is loaded: see server/cli.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Kernels are interpreted, on CPU tensors; Triton decides when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the engine's end-to-end tests run it")
    parser.addoption(
        "--openapi-cases", type=int, default=600, help="how many drawn requests the API must bear"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--device")
    return name


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 of a few thousand random parameters, as a directory; it never says EOS."""
    config = Gemma4TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoints") / "small"
    Gemma4ForCausalLM(config).save_pretrained(path)
    return path
