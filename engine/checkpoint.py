"""Finding a checkpoint and reading its configs and tensors.

A checkpoint is a Hugging Face directory with safetensors, or a GGUF file. Whichever it is, the rest
of Bezel sees the same: a `config.json`-shaped dict, and tensors under Hugging Face's names. Pickled
weights are never loaded. Nothing here needs torch until a tensor is read.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors

from bezel.engine.cache_folder import default_cache_root
from bezel.engine.default_model import default_model_path
from bezel.engine.errors import CheckpointError
from bezel.engine.gguf import GGUFFile
from bezel.engine.gguf_config import hf_config, hf_generation_config
from bezel.engine.gguf_tensors import hf_tensor_sources, iterate_hf_tensors
from bezel.engine.hub import download
from bezel.engine.model_config import GEMMA3_TYPES, GEMMA4_TYPES

if TYPE_CHECKING:
    import torch

    from bezel.engine.packing import StoredRows
    from bezel.kernels.packed import WeightFormat

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`name` is what clients call the model. `cache_root` None means the default one.

    `file` is a GGUF file that has been opened: going through its header takes a tenth of a second.
    """

    path: Path
    format: Literal["safetensors", "gguf"]
    name: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    cache_root: Path | None = None
    file: GGUFFile | None = field(default=None, compare=False, repr=False)

    @property
    def gguf(self) -> GGUFFile:
        """The GGUF file of this checkpoint, which is in that format.

        Raises:
            CheckpointError: the file can't be opened or is damaged.
        """
        return self.file or GGUFFile(self.path)


def resolve_checkpoint(
    model: str, revision: str | None = None, *, cache_root: Path | None = None
) -> Checkpoint:
    """Find "default", a directory, a `.gguf` file, or `org/name` on the Hugging Face hub.

    `revision` is a branch, tag or commit on the hub.

    Raises:
        CheckpointError: not found, damaged, or a model Bezel doesn't serve.
    """
    if model == "default":
        path = default_model_path(cache_root or default_cache_root())
        return _from_gguf(path, "gemma-3-270m", cache_root)
    path = Path(model)
    if path.is_dir():
        return _from_directory(path, path.resolve().name, cache_root)
    if path.suffix == ".gguf":
        return _from_gguf(path, path.stem, cache_root)
    if path.exists():
        raise CheckpointError(f"{model} is neither a directory nor a .gguf file")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such directory or file")
    return _from_directory(download(model, revision), model, cache_root)


def num_tensors(checkpoint: Checkpoint) -> int:
    """How many tensors `iterate_tensors` yields."""
    if checkpoint.format == "gguf":
        return len(hf_tensor_sources(checkpoint.gguf))
    return sum(len(_names_in(shard)) for shard in _shards(checkpoint.path))


def iterate_tensors(
    checkpoint: Checkpoint, format_of: Callable[[str], "WeightFormat | None"] = lambda name: None
) -> Iterator[tuple[str, "torch.Tensor | StoredRows"]]:
    """Read one tensor after the other: as stored from safetensors, in float32 from GGUF, of which
    those that will be packed, as `format_of` says of a name, come as rows that are still to be
    read.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor can't be dequantised.
    """
    if checkpoint.format == "gguf":
        yield from iterate_hf_tensors(checkpoint.gguf, format_of)
        return
    for shard in _shards(checkpoint.path):
        with _opened(shard, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """The dtype of each tensor of a directory, as safetensors spells it, such as `BF16`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    dtypes: dict[str, str] = {}
    for shard in _shards(checkpoint.path):
        with _opened(shard, framework="np") as tensors:
            dtypes |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    return dtypes


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file can't be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} doesn't hold a JSON object")
    return value


def _from_gguf(path: Path, name: str, cache_root: Path | None) -> Checkpoint:
    file = GGUFFile(path)
    try:
        config = hf_config(file.metadata, file.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
    generation = hf_generation_config(file.metadata, file.token_id)
    return Checkpoint(path, "gguf", name, config, generation, cache_root, file)


def _from_directory(path: Path, name: str, cache_root: Path | None) -> Checkpoint:
    if not (path / "config.json").exists():
        hint = "; name the .gguf file itself" if any(path.glob("*.gguf")) else ""
        raise CheckpointError(f"{path} has no config.json{hint}")
    config = read_json(path / "config.json")
    known = (*GEMMA3_TYPES, *GEMMA4_TYPES)
    if config.get("model_type") not in known:
        raise CheckpointError(
            f"{path} holds a model of type {config.get('model_type')!r}; "
            f"Bezel serves {', '.join(known)}"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else "?"
        raise CheckpointError(f"{path} is quantised ({method}); only GGUF may be, so far")
    _shards(path)
    generation = path / "generation_config.json"
    generation_config = read_json(generation) if generation.exists() else {}
    return Checkpoint(path, "safetensors", name, config, generation_config, cache_root)


def _shards(directory: Path) -> list[Path]:
    """The safetensors files of a directory, each of them there and complete by the index."""
    if (directory / _INDEX).exists():
        return _indexed_shards(directory)
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        pickles = [file.name for pattern in _PICKLES for file in directory.glob(pattern)]
        hint = f"; pickled weights such as {pickles[0]} aren't loaded" if pickles else ""
        raise CheckpointError(f"{directory} has no .safetensors files{hint}")
    return shards


def _indexed_shards(directory: Path) -> list[Path]:
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise CheckpointError(f"{directory / _INDEX} has no weight_map")
    for name in weight_map.values():
        # Files beside the index, which may themselves be links: the hub's cache is made of them.
        if not (isinstance(name, str) and _SHARD.fullmatch(name)):
            raise CheckpointError(
                f"{directory / _INDEX} names {name!r}, which isn't a .safetensors file beside it"
            )
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.exists():
            raise CheckpointError(f"{directory} lacks {shard.name}, which its index names")
        names = _names_in(shard)
        for tensor, file in weight_map.items():
            if file == shard.name and tensor not in names:
                raise CheckpointError(f"{shard} lacks {tensor}, which the index says it holds")
    return shards


def _names_in(shard: Path) -> set[str]:
    with _opened(shard, framework="np") as tensors:
        return set(tensors.keys())


def _opened(shard: Path, framework: str) -> Any:
    try:
        return safetensors.safe_open(shard, framework=framework)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{shard} can't be read: {error}") from error
