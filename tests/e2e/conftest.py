"""Tiny random checkpoints of every Gemma shape, saved by transformers, with its greedy answers."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gemma4_checkpoint import write_gemma4_checkpoint
from server_process import Server, running
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

VOCAB = 384
NUM_OUTPUT_TOKENS = 10
# Around the windows (5 … 32), pages of 16 and 64 tokens, chunks of 7 and 64; then many windows.
PROMPT_LENGTHS = (1, 2, 4, 5, 6, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 150)


def _gemma4(num_layers: int = 6, period: int = 3, **overrides: Any) -> Gemma4TextConfig:
    kinds = [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention"
        for i in range(num_layers)
    ]
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        hidden_size_per_layer_input=0,
        sliding_window=32,
        layer_types=kinds,
        final_logit_softcapping=30.0,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    return Gemma4TextConfig(**(settings | overrides))


def _gemma3(kinds: list[str]) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=9,
        layer_types=kinds,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
        max_position_embeddings=512,
        eos_token_id=None,
    )


K_EQ_V: dict[str, Any] = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
MOE: dict[str, Any] = dict(enable_moe_block=True, num_experts=16, moe_intermediate_size=24)

CONFIGS: dict[str, Callable[[], Gemma3TextConfig | Gemma4TextConfig]] = {
    # The five published shapes, scaled down: layer pattern, sharing, heads and extras as in
    # their config.json.
    "E2B": lambda: _gemma4(
        10,
        5,
        num_attention_heads=8,
        num_key_value_heads=1,
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=12,
    ),
    "E4B": lambda: _gemma4(
        12,
        6,
        num_attention_heads=8,
        num_kv_shared_layers=6,
        hidden_size_per_layer_input=12,
    ),
    "12B": lambda: _gemma4(6, 6, num_attention_heads=16, num_key_value_heads=8, **K_EQ_V),
    "26B-A4B": lambda: _gemma4(
        6,
        6,
        num_attention_heads=8,
        num_key_value_heads=4,
        **MOE,
        top_k_experts=8,
        **(K_EQ_V | dict(num_global_key_value_heads=2)),
    ),
    "31B": lambda: _gemma4(
        12,
        6,
        num_attention_heads=8,
        num_key_value_heads=4,
        **(K_EQ_V | dict(num_global_key_value_heads=2)),
    ),
    # Odd ones.
    "window-5": lambda: _gemma4(sliding_window=5),
    "window-7-k-eq-v": lambda: _gemma4(sliding_window=7, **K_EQ_V),
    "three-share-kv": lambda: _gemma4(6, 2, num_kv_shared_layers=3, hidden_size_per_layer_input=12),
    "shared-k-eq-v-window-5": lambda: _gemma4(
        8, 2, num_kv_shared_layers=4, hidden_size_per_layer_input=12, sliding_window=5, **K_EQ_V
    ),
    "one-kv-head": lambda: _gemma4(num_key_value_heads=1),
    "group-of-16": lambda: _gemma4(num_attention_heads=16, num_key_value_heads=1),
    "real-head-dims": lambda: _gemma4(2, 2, head_dim=256, global_head_dim=512, **K_EQ_V),
    "only-last-global": lambda: _gemma4(5, 5),
    "top-1": lambda: _gemma4(**MOE, top_k_experts=1),
    "untied-no-softcap": lambda: _gemma4(tie_word_embeddings=False, final_logit_softcapping=None),
    "gemma3": lambda: _gemma3((["sliding_attention"] * 2 + ["full_attention"]) * 2),
    # As Gemma 3 1B and 4B.
    "gemma3-ends-local": lambda: _gemma3(["full_attention"] + ["sliding_attention"] * 3),
}


@dataclass(frozen=True)
class TinyCheckpoint:
    """A saved checkpoint, prompts, and what transformers answers greedily in float32."""

    path: Path
    model: PreTrainedModel
    prompts: list[list[int]]
    answers: list[list[int]]

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """transformers' logits at every position, without a cache: L×V."""
        with torch.inference_mode():
            return self.model(torch.tensor([token_ids]), use_cache=False).logits[0]


def _weights(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """What a checkpoint stores, buffers too."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(n, tensor) for n, tensor in tensors if "inv_freq" not in n and "embed_scale" not in n]


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Weights whose effects are all visible: no ones, no zeros, logits far apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in _weights(model):
        if tensor.dim() > 1:
            tensor.data.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
        elif "norm" in name and isinstance(model, Gemma3ForCausalLM):
            tensor.data.uniform_(-0.4, 0.6, generator=generator)
        else:
            tensor.data.uniform_(0.6, 1.4, generator=generator)
        if "q_norm" in name and not isinstance(model, Gemma3ForCausalLM):
            # Without a scale of its own, attention would be so sharp that rounding differences
            # grow from layer to layer, as they do in no trained model.
            tensor.data.mul_(0.3)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    return make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(params=["31B", "E2B", "gemma3", "untied-no-softcap"])
def tiny_in_bfloat16(request: pytest.FixtureRequest, tmp_path: Path) -> TinyCheckpoint:
    """Stored so; the answers are those of float32 all the same."""
    return make_tiny(request.param, tmp_path / request.param, torch.bfloat16)


def make_tiny(name: str, path: Path, stored: torch.dtype = torch.float32) -> TinyCheckpoint:
    config = CONFIGS[name]()
    family = Gemma3ForCausalLM if name.startswith("gemma3") else Gemma4ForCausalLM
    model = family._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomize(model, seed=len(name))
    for _, tensor in _weights(model):
        tensor.data.copy_(tensor.to(stored))
    copy.deepcopy(model).to(stored).save_pretrained(path)
    generator = torch.Generator().manual_seed(7)
    prompts = [
        torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    answers = [_greedy(model, prompt) for prompt in prompts]
    return TinyCheckpoint(path, model, prompts, answers)


def _greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_OUTPUT_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def gemma4_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server of a tiny random Gemma 4, called `tiny-gemma-4`."""
    folder = tmp_path_factory.mktemp("gemma4")
    write_gemma4_checkpoint(folder / "tiny-gemma-4")
    with running(folder, str(folder / "tiny-gemma-4")) as server:
        yield server
