"""Decode steps recorded on a CPU give the very tokens and logits of those computed one by one."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma4ForCausalLM, Gemma4TextConfig

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.sampling_params import SamplingParams

VOCAB = 320
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
    sliding_window=24,
    layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
    max_position_embeddings=1024,
    eos_token_id=None,
)
GEMMA4 = SHAPE | dict(
    vocab_size_per_layer_input=VOCAB, global_head_dim=128, hidden_size_per_layer_input=0
)
CONFIGS: dict[str, Gemma3TextConfig | Gemma4TextConfig] = {
    "gemma3": Gemma3TextConfig(**SHAPE),
    "k-eq-v": Gemma4TextConfig(**GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1),
    "shared-kv": Gemma4TextConfig(
        **(GEMMA4 | dict(hidden_size_per_layer_input=64, num_kv_shared_layers=3))
    ),
    "experts": Gemma4TextConfig(
        **GEMMA4, enable_moe_block=True, num_experts=64, top_k_experts=4, moe_intermediate_size=32
    ),
}
PROMPT_LENGTHS = (1, 5, 23, 24, 25, 64, 65, 200)


@pytest.fixture(scope="module", params=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIGS[request.param]
    family = Gemma3ForCausalLM if request.param == "gemma3" else Gemma4ForCausalLM
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    family(config).to(torch.bfloat16).save_pretrained(path)
    return path


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def engine_for(path: Path, **settings: Any) -> Engine:
    return Engine(
        EngineConfig(model=str(path), kv_cache_memory_bytes=1 << 24, max_num_seqs=16, **settings)
    )


def outputs(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams]
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens, and the logits of every step."""
    logits = []
    run = engine.runner.run

    def run_and_keep(step: Any) -> Any:
        result = run(step)
        logits.append(result[0].clone())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "run", run_and_keep)
        return engine.generate(prompts, params), logits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_recorded_steps_are_the_same_steps(checkpoint: Path, quantization: str, dtype: str) -> None:
    settings = dict(dtype=dtype, quantization=quantization)
    eager = engine_for(checkpoint, enforce_eager=True, **settings)
    recorded = engine_for(checkpoint, **settings)
    prompts = prompts_of(PROMPT_LENGTHS)
    params = [  # so that steps have 8, 7, 6 … sequences
        SamplingParams(max_tokens=8 + 9 * i, temperature=0.0, ignore_eos=True)
        for i in range(len(prompts))
    ]
    for _ in range(2):  # the second time nothing is recorded anew
        expected_tokens, expected = outputs(eager, prompts, params)
        tokens, logits = outputs(recorded, prompts, params)
        assert tokens == expected_tokens
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    programs = recorded.runner.decode_programs
    assert eager.runner.decode_programs is None and programs is not None
    assert programs.sizes == set(range(1, len(prompts) + 1))
