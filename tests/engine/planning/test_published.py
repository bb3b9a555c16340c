"""The built-in configs are those that the checkpoints ship, whatever a model is called."""

from typing import Any

import pytest

from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.published import PUBLISHED, published_config, published_name


@pytest.mark.parametrize("size", ["E2B", "E4B", "12B", "26B-A4B", "31B"])
def test_shapes_are_those_of_config_json(size: str, real_configs: dict[str, Any]) -> None:
    ours = ModelConfig.from_hf(PUBLISHED[f"gemma-4-{size}"])
    assert ours == ModelConfig.from_hf(real_configs[size])


@pytest.mark.parametrize(
    "name", ["gemma-4-26B-A4B", "google/gemma-4-26B-A4B-it", "GEMMA-4-26b-a4b", "x/gemma-4-26b-A4B"]
)
def test_names_are_forgiven_much(name: str) -> None:
    assert published_name(name) == "gemma-4-26B-A4B"
    assert published_config(name) is PUBLISHED["gemma-4-26B-A4B"]


@pytest.mark.parametrize("name", ["gemma-4-26B", "gemma-4-26B-A4B-it-GGUF", "default", ""])
def test_others_are_unknown(name: str) -> None:
    assert published_config(name) is None
