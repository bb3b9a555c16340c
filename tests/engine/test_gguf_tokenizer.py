"""Converting a GGUF file's tokenizer, and keeping the result."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bezel.engine.gguf_tokenizer
from bezel.engine.errors import CheckpointError
from bezel.engine.gguf_tokenizer import convert_tokenizer

CONTROL, USER_DEFINED, BYTE, NORMAL = 3, 4, 6, 1
TOKENS = [
    *(("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", CONTROL)),
    ("<mask>", CONTROL),
    *(("<|turn>", CONTROL), ("<turn|>", CONTROL), ("<|channel>", USER_DEFINED)),
    *(("\n", USER_DEFINED), ("\n\n", USER_DEFINED)),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
    *((token, NORMAL) for token in ["h", "i", "▁", "hi", "▁hi", "  ", "日"]),
]
METADATA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [token for token, _ in TOKENS],
    "tokenizer.ggml.token_type": [kind for _, kind in TOKENS],
    "tokenizer.ggml.scores": [0.0] * len(TOKENS),
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{{ messages }}",
}
GEMMA4 = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": ["h i", "▁ hi"]}


@pytest.fixture
def convert(write_gguf: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    def convert(cache: Path = tmp_path / "cache", **changes: Any) -> Any:
        metadata = METADATA | {key.replace("__", "."): value for key, value in changes.items()}
        path = write_gguf("gemma3", metadata, {"a": np.ones(32, np.float32)})
        return convert_tokenizer(path, cache)

    return convert


def pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("kind", [{}, GEMMA4], ids=["llama", "gemma4"])
def test_vocabulary_merges_and_control_tokens(convert: Callable[..., Any], kind: Any) -> None:
    tokenizer, config = convert(**kind)
    assert pieces(tokenizer, "hi hi\n\n日é") == ["hi", "▁hi", "\n\n", "日", "<0xC3>", "<0xA9>"]
    assert pieces(tokenizer, "<|turn>hi<turn|>") == ["<|turn>", "hi", "<turn|>"]
    assert config == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "chat_template": "{{ messages }}",
    }
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    assert special >= {"<|turn>", "<turn|>", "<|channel>"}
    assert "\n" not in special
    assert tokenizer.get_vocab_size() == len(TOKENS)


def test_the_second_start_reads_the_cache(
    convert: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, config = convert()
    [folder] = (tmp_path / "cache" / "tokenizers").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    monkeypatch.setattr(bezel.engine.gguf_tokenizer, "_convert", None)
    second, config_again = convert()
    assert second.to_str() == first.to_str()
    assert config_again == config


def test_another_file_has_another_cache_entry(convert: Callable[..., Any], tmp_path: Path) -> None:
    convert()
    assert convert(tokenizer__chat_template="other")[1]["chat_template"] == "other"
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 2


def test_a_damaged_cache_entry_is_made_again(
    convert: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = convert()
    [folder] = (tmp_path / "cache" / "tokenizers").iterdir()
    (folder / "tokenizer.json").write_text('{"version":')
    with caplog.at_level(logging.WARNING, "bezel"):
        assert convert()[0].to_str() == first.to_str()
    assert "damaged tokenizer" in caplog.text
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == first.to_str()


def test_it_works_without_a_writable_cache(
    convert: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    with caplog.at_level(logging.WARNING, "bezel"):
        tokenizer, _ = convert(cache=tmp_path / "file")
    assert pieces(tokenizer, "hi") == ["hi"]
    assert "can't be kept in" in caplog.text


def test_other_vocabularies_are_refused(convert: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match="of kind 'gpt2', not one of Gemma's"):
        convert(tokenizer__ggml__model="gpt2")
    with pytest.raises(CheckpointError, match="lacks some of Gemma's control tokens"):
        convert(tokenizer__ggml__tokens=["a", "b"], tokenizer__ggml__token_type=[1, 1])
    with pytest.raises(CheckpointError, match="can't be converted"):
        convert(**GEMMA4 | {"tokenizer.ggml.merges": ["h nowhere"]})
    with pytest.raises(CheckpointError, match="can't be converted"):
        convert(tokenizer__ggml__tokens=7)
