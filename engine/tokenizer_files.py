"""The files behind a tokenizer: vocabulary, settings and chat template of a checkpoint.

A GGUF file's are converted first (`gguf_tokenizer`); either way the result is what a Hugging Face
directory holds. Where those keep the chat template has changed over time, so all places are tried.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from bezel.engine.allocator import release_freed_memory
from bezel.engine.cache_folder import default_cache_root
from bezel.engine.checkpoint import Checkpoint, read_json
from bezel.engine.errors import CheckpointError
from bezel.engine.gguf_tokenizer import convert_tokenizer


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """`special_tokens` maps names templates know ("bos_token") to the tokens' text."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | None


def load_tokenizer_files(checkpoint: Checkpoint) -> TokenizerFiles:
    """Read, or convert, the tokenizer of a checkpoint.

    Raises:
        CheckpointError: there is none, or it can't be read.
    """
    files = _load(checkpoint)
    # Reading Gemma's vocabulary takes three times the memory that it fills.
    release_freed_memory()
    return files


def _load(checkpoint: Checkpoint) -> TokenizerFiles:
    if checkpoint.format == "gguf":
        cache_root = checkpoint.cache_root or default_cache_root()
        backend, config = convert_tokenizer(checkpoint.path, cache_root, checkpoint.file)
        return TokenizerFiles(backend, _special_tokens(config), config.get("chat_template"))
    directory = checkpoint.path
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    return TokenizerFiles(
        _read_vocabulary(directory / "tokenizer.json"),
        _special_tokens(config),
        _find_template(directory, config),
    )


def _read_vocabulary(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{path} can't be read: {error}") from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Each `…_token` of a `tokenizer_config.json`: a string, or an object around one."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _find_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    path = directory / "chat_template.json"
    if template is None and path.exists():
        template = read_json(path).get("chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"the chat_template of {directory} isn't a string")
    return template
