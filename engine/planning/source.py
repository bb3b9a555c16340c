"""From what a user calls a model to its shape, without weights."""

from pathlib import Path
from typing import Any

import torch

from bezel.engine.checkpoint import read_json, resolve_checkpoint
from bezel.engine.config import EngineConfig
from bezel.engine.errors import CheckpointError
from bezel.engine.hub import download_config
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.decoder import Decoder
from bezel.engine.packing import with_whole_experts
from bezel.engine.planning.model import FormatChoice
from bezel.engine.planning.published import PUBLISHED, published_name
from bezel.engine.quantization import (
    Types,
    bfloat16_matrices,
    choose_formats,
    stored_in_bfloat16,
    stored_types,
)
from bezel.kernels.packed import WeightFormat


def resolve_config(model: str, *, use_published: bool = True) -> tuple[str, ModelConfig]:
    """Name and shape of "default", a directory or config.json, a `.gguf` file, a published model,
    or another on the hub, of which only config.json is downloaded.

    Without `use_published`, what the hub has comes first, as when the model is served.

    Raises:
        CheckpointError: not found, or a model Bezel doesn't serve.
    """
    name, config = _find(model, use_published)
    if config.get("quantization_config"):
        raise CheckpointError(f"{name} is quantised; only GGUF may be, so far")
    return name, ModelConfig.from_hf(config)


def format_choice(config: EngineConfig, is_gpu: bool) -> FormatChoice:
    """Which weights of `config.model` are kept in another format than the model's dtype on a GPU or
    a CPU. What files store their headers say; models that aren't here are taken to be stored in
    bfloat16, as all that are published."""
    stored = _stored(config.model)

    def choose(model: Decoder) -> dict[str, WeightFormat]:
        formats = choose_formats(config, model, is_gpu, stored or {})
        if is_gpu or model.embed_tokens.dtype == torch.bfloat16:
            return formats
        if stored is None:
            return with_whole_experts(bfloat16_matrices(model) | formats)
        return with_whole_experts(stored_in_bfloat16(model, stored) | formats)

    return choose


def _stored(model: str) -> Types | None:
    """None if there are no weights here, perhaps a config.json alone."""
    has_weights = Path(model).is_dir() and any(Path(model).glob("*.safetensors"))
    if model == "default" or model.endswith(".gguf") or has_weights:
        return stored_types(resolve_checkpoint(model))
    return None


def _find(model: str, use_published: bool) -> tuple[str, dict[str, Any]]:
    path = Path(model)
    if model == "default" or path.suffix == ".gguf":
        checkpoint = resolve_checkpoint(model)
        return checkpoint.name, checkpoint.config
    if path.is_dir():
        if not (path / "config.json").exists():
            hint = "; name the .gguf file itself" if any(path.glob("*.gguf")) else ""
            raise CheckpointError(f"{path} has no config.json{hint}")
        return path.resolve().name, read_json(path / "config.json")
    if path.is_file():
        return path.resolve().parent.name, read_json(path)
    published = published_name(model)
    if published is not None and use_published:
        return published, PUBLISHED[published]
    if "/" not in model:
        known = ", ".join(PUBLISHED)
        raise CheckpointError(
            f"{model}: no such directory or file, nor a model known by name; those are {known}"
        )
    return model, read_json(download_config(model))
