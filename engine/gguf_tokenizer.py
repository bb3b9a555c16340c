"""The tokenizer of a GGUF file, as the `tokenizer.json` a Hugging Face directory would have.

GGUF stores a vocabulary without merges; transformers knows how to get them back, but takes seconds.
So the result is kept in the cache, in a folder that is complete or not there at all, and the next
start reads that. Without a writable cache it is made anew each time.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from bezel.engine.errors import CheckpointError
from bezel.engine.gguf import GGUFFile

logger = logging.getLogger("bezel")

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
# Control tokens that GGUF files mark as user-defined so that llama.cpp prints them.
_PRINTED_CONTROL = frozenset(
    "<|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|>".split()
) | {'<|"|>'}
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def convert_tokenizer(
    path: Path, cache_root: Path, opened: GGUFFile | None = None
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer and the `tokenizer_config.json` of a GGUF file, from the cache if possible.

    `opened` is the same file, whose vocabulary isn't read.

    Raises:
        CheckpointError: the file is damaged, or its vocabulary isn't one of Gemma's.
    """
    made_by = f"{(opened or GGUFFile(path)).header_digest()} transformers {version('transformers')}"
    folder = cache_root / "tokenizers" / hashlib.sha256(made_by.encode()).hexdigest()[:32]
    if folder.is_dir():
        try:
            return _load(folder)
        except Exception as error:  # whatever is wrong with it, it can be made again
            logger.warning("Making the damaged tokenizer in %s again: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    file = GGUFFile(path)
    tokenizer, config = _convert(file), _tokenizer_config(file.metadata)
    try:
        _store(folder, tokenizer, config)
    except OSError as error:
        if not folder.is_dir():  # else another process was quicker
            logger.warning("The converted tokenizer can't be kept in %s: %s", folder, error)
    return tokenizer, config


def _load(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config


def _store(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        (unfinished / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        (unfinished / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(file: GGUFFile) -> tokenizers.Tokenizer:
    # Slow to import, and needed only on a file's first start.
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("llama", "gemma4"):
        raise CheckpointError(f"{file.path}: its tokenizer is of kind {kind!r}, not one of Gemma's")
    values = {
        name: file.metadata[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in file.metadata
    }
    logger.info("Converting the tokenizer of %s (only once)", file.path.name)
    try:
        values["token_type"] = _token_types(values)
        tokenizer: tokenizers.Tokenizer = convert_gguf_tokenizer("gemma3", values)[0]
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{file.path}: its tokenizer can't be converted: {error}") from error
    if tokenizer.get_vocab_size() > len(values["tokens"]):
        # transformers adds the control tokens it misses, under ids the model has no embedding for.
        raise CheckpointError(f"{file.path}: its vocabulary lacks some of Gemma's control tokens")
    return tokenizer


def _token_types(values: dict[str, Any]) -> list[int]:
    tokens, types = values.get("tokens", []), values.get("token_type", [])
    return [
        _CONTROL if kind == _USER_DEFINED and token in _PRINTED_CONTROL else kind
        for token, kind in zip(tokens, types, strict=False)
    ]


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        name: tokens[metadata[key]]
        for name, key in _SPECIAL_TOKENS.items()
        if metadata.get(key, -1) in range(len(tokens))
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config
