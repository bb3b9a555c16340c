"""Gemma 3 270M, real weights: greedy tokens equal transformers' in float32."""

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from bezel.engine.checkpoint import iterate_tensors, resolve_checkpoint
from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.tokenizer import Tokenizer

pytestmark = pytest.mark.weights

NUM_OUTPUT_TOKENS = 64
STORY = (
    "The lighthouse keeper wrote down the weather every evening, and nobody ever read it. "
    "One winter the ink froze, so he began to learn the numbers by heart instead. "
)
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a land far away,",
    "Q: What is the largest planet?\nA:",
    '{"name": "Ada", "born": 1815, "known for": "',
    "1, 1, 2, 3, 5, 8, 13,",
    "Roses are red,\nviolets are",
    "SELECT name, count(*) FROM orders WHERE",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Die Hauptstadt von Deutschland ist",
    "La photosynthèse est le processus par lequel",
    "日本の首都は",
    "Столица России — это",
    "عاصمة مصر هي",
    "भारत की राजधानी",
    "🙂🚀 emojis and other symbols: ∑ √ ∞",
    # Longer than the window of 512 tokens: once, twice and four times.
    STORY * 17 + "Then",
    STORY * 34 + "Then",
    "Le phare. " + STORY * 66 + "Enfin",
]


@pytest.fixture(scope="module")
def engine(device: str) -> Engine:
    return Engine(
        EngineConfig(model="default", dtype="float32", device=device, kv_cache_memory_bytes=1 << 30)
    )


@pytest.fixture(scope="module")
def reference() -> Gemma3ForCausalLM:
    """transformers' model, filled with the same dequantised tensors."""
    checkpoint = resolve_checkpoint("default")
    config = Gemma3TextConfig(**checkpoint.config)
    model = Gemma3ForCausalLM._from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dict(iterate_tensors(checkpoint)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def test_twenty_prompts_of_64_tokens(engine: Engine, reference: Any) -> None:
    """Whatever transformers' logits favour after every prefix is what Bezel generated."""
    tokenizer = Tokenizer.load(engine.checkpoint)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert len(prompts) == 20 and max(map(len, prompts)) > 4 * 512
    greedy = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    answers = engine.generate(prompts, greedy)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = reference(
                torch.tensor([prompt + answer]),
                use_cache=False,
                logits_to_keep=NUM_OUTPUT_TOKENS + 1,
            ).logits[0, :-1]
        assert answer == logits.argmax(-1).tolist()
