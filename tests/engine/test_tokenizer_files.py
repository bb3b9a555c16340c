"""All the places where Hugging Face directories keep a chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bezel.engine.checkpoint import Checkpoint
from bezel.engine.errors import CheckpointError
from bezel.engine.tokenizer_files import load_tokenizer_files


@pytest.fixture
def directory(tmp_path: Path, make_backend: Callable[..., Any]) -> Path:
    make_backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load(directory: Path) -> Any:
    return load_tokenizer_files(Checkpoint(directory, "safetensors", "x", {}, {}))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_special_tokens_are_strings_or_objects(directory: Path) -> None:
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "unk_token": None}
    write(directory / "tokenizer_config.json", config)
    assert load(directory).special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}


def test_a_directory_may_lack_all_but_the_vocabulary(directory: Path) -> None:
    files = load(directory)
    assert files.chat_template is None
    assert files.backend.token_to_id("<bos>") == 2


def test_templates_by_preference(directory: Path) -> None:
    write(directory / "chat_template.json", {"chat_template": "oldest"})
    assert load(directory).chat_template == "oldest"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "list"}]
    write(directory / "tokenizer_config.json", {"chat_template": named})
    assert load(directory).chat_template == "list"
    write(directory / "tokenizer_config.json", {"chat_template": "string"})
    assert load(directory).chat_template == "string"
    (directory / "chat_template.jinja").write_text("file")
    assert load(directory).chat_template == "file"


def test_what_cannot_be_read_is_named(directory: Path) -> None:
    write(directory / "tokenizer_config.json", {"chat_template": 7})
    with pytest.raises(CheckpointError, match=r"chat_template of .* isn't a string"):
        load(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
        load(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load(directory)
