"""A tiny random Gemma 4 with the real vocabulary and chat template, for whole servers."""

import json
from pathlib import Path

import torch
from gemma4_chat import CONTROL_TOKENS, write_tokenizer
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

VOCAB = 262_144
# <eos>, <turn|> and <|tool_response>, as the published models have it.
EOS_TOKEN_IDS = [1, 106, 50]


def write_gemma4_checkpoint(path: Path) -> None:
    """Write its directory. It babbles: only a grammar makes it end, call or say something."""
    config = Gemma4TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=8192,
        eos_token_id=EOS_TOKEN_IDS,
    )
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(config)
    # Logits of 0 are never among the likeliest of this many.
    model.get_input_embeddings().weight.data[[*EOS_TOKEN_IDS, *CONTROL_TOKENS]] = 0
    model.save_pretrained(path)
    generation = {"eos_token_id": EOS_TOKEN_IDS, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    write_tokenizer(path)
