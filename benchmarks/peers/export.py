"""The default model as a Hugging Face folder in bfloat16, for peers that can't read its GGUF file.

The weights are those of the GGUF file, dequantised and rounded once, as Bezel computes with them.
"""

import json
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from bezel.engine.checkpoint import iterate_tensors, resolve_checkpoint
from bezel.engine.tokenizer_files import TokenizerFiles, load_tokenizer_files


def export_default_model(folder: Path) -> None:
    """Write configuration, weights and tokenizer to `folder`, unless it has a config.json, which
    comes last."""
    if (folder / "config.json").exists():
        return
    checkpoint = resolve_checkpoint("default")
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(load_tokenizer_files(checkpoint), folder)
    config = Gemma3TextConfig(**checkpoint.config)
    model = Gemma3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    tensors = {name: tensor.bfloat16() for name, tensor in iterate_tensors(checkpoint)}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    unfinished = folder / "unfinished"
    model.save_pretrained(unfinished)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(folder / file.name)
    unfinished.rmdir()


def _write_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    """With <bos> put in front by the file itself: Bezel does so whatever a file says."""
    bos = files.special_tokens["bos_token"]
    bos_id = files.backend.token_to_id(bos)
    assert bos_id is not None
    files.backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    files.backend.save(str(folder / "tokenizer.json"))
    named = files.special_tokens | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
