"""From what a user calls a model to its shape, without weights."""

from pathlib import Path
from typing import Any

from bezel.engine.checkpoint import read_json, resolve_checkpoint
from bezel.engine.config import EngineConfig
from bezel.engine.errors import CheckpointError
from bezel.engine.hub import download_config
from bezel.engine.model_config import ModelConfig
from bezel.engine.planning.model import FormatChoice
from bezel.engine.planning.published import PUBLISHED, published_name
from bezel.engine.quantization import Types, choose_formats, stored_types


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
    """Which weights of `config.model` are packed on a GPU or a CPU; of a GGUF file the header
    says what it stores."""
    stored: Types = {}
    if config.model == "default" or config.model.endswith(".gguf"):
        stored = stored_types(resolve_checkpoint(config.model))
    return lambda model: choose_formats(config, model, is_gpu, stored)


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
