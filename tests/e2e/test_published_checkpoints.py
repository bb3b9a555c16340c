"""Multimodal checkpoints as published: wrapped text models in shards, with towers beside them.

Small ones are saved by transformers' own classes; Bezel loads the text model out of each and gives
the same greedy tokens.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedModel,
)

from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.sampling_params import SamplingParams

VOCAB = 384
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
PROMPT_LENGTHS = (1, 7, 40, 90)  # below and beyond windows of 9 and 32, pages of 16 and 64

TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=32,
    layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
    max_position_embeddings=512,
    eos_token_id=None,
)
GEMMA4_TEXT: dict[str, Any] = TEXT | dict(global_head_dim=32, final_logit_softcapping=30.0)
K_EQ_V: dict[str, Any] = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
GEMMA4_VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    position_embedding_size=64,
)


def with_audio() -> PreTrainedModel:
    """As E2B and E4B: towers for images and sound, per-layer embeddings, shared KV."""
    text = GEMMA4_TEXT | dict(
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=12, num_kv_shared_layers=3
    )
    audio = dict(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        subsampling_conv_channels=[8, 8],
        output_proj_dims=32,
    )
    vision = GEMMA4_VISION | dict(use_clipped_linears=True)
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=audio)
    return Gemma4ForConditionalGeneration(config)


def with_experts() -> PreTrainedModel:
    """As 26B-A4B: a tower for images, experts, keys that are values. All experts are chosen:
    otherwise bfloat16 may choose others where two are nearly equal, and logits jump."""
    text = (
        GEMMA4_TEXT
        | K_EQ_V
        | dict(
            hidden_size_per_layer_input=0,
            use_bidirectional_attention="vision",
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=4,
            moe_intermediate_size=24,
        )
    )
    vision = GEMMA4_VISION | dict(standardize=True)
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision))


def unified() -> PreTrainedModel:
    """As 12B: images and sound without towers."""
    config = Gemma4UnifiedConfig(
        text_config=GEMMA4_TEXT | K_EQ_V,
        vision_config=dict(mm_embed_dim=64, mm_posemb_size=16, output_proj_dims=64),
        audio_config=dict(audio_embed_dim=40),
    )
    return Gemma4UnifiedForConditionalGeneration(config)


def gemma3() -> PreTrainedModel:
    """As Gemma 3 4B and larger."""
    text = TEXT | dict(sliding_window=9, rope_scaling={"rope_type": "linear", "factor": 8.0})
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], set[str]]] = {
    "gemma4-with-audio": (
        with_audio,
        {"vision_tower", "audio_tower", "embed_vision", "embed_audio"},
    ),
    "gemma4-with-experts": (with_experts, {"vision_tower", "embed_vision"}),
    "gemma4-unified": (unified, {"vision_embedder", "embed_vision", "embed_audio"}),
    "gemma3": (gemma3, {"vision_tower", "multi_modal_projector"}),
}


@dataclass(frozen=True)
class Published:
    """A checkpoint in shards, the model it was saved from, and its greedy answers to prompts."""

    path: Path
    model: PreTrainedModel
    modalities: set[str]
    prompts: list[list[int]]
    answers: list[list[int]]


def greedy_answer(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


def randomize_text(model: PreTrainedModel, is_gemma3: bool) -> None:
    """Weights that all show: no ones, no zeros, logits far apart."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.model.language_model.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
        elif is_gemma3:
            tensor.uniform_(-0.4, 0.6, generator=generator)
        else:
            # Gemma 4 doesn't scale its scores; trained queries are small instead.
            tensor.uniform_(0.6, 1.4, generator=generator).mul_(0.3 if "q_norm" in name else 1.0)


@pytest.fixture(scope="module", params=list(FAMILIES))
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    build, modalities = FAMILIES[request.param]
    model = build().eval()
    model.set_attn_implementation("eager")
    randomize_text(model, is_gemma3=request.param == "gemma3")
    path = tmp_path_factory.mktemp("published") / request.param
    model.save_pretrained(path, max_shard_size="200KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    generator = torch.Generator().manual_seed(7)
    prompts = [
        torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    answers = [greedy_answer(model, prompt) for prompt in prompts]
    return Published(path, model, modalities, prompts, answers)


def make_engine(path: Path, dtype: str = "float32") -> Engine:
    config = EngineConfig(
        model=str(path), dtype=dtype, device="cpu", kv_cache_memory_bytes=16 << 20
    )
    return Engine(config)


def first_logits(engine: Engine, prompt: list[int]) -> Tensor:
    """What the first token after `prompt` is drawn from."""
    seen: list[Tensor] = []
    run = engine.runner.run

    def recording_run(step: Any) -> Any:
        logits_NV, prompt_logprobs = run(step)
        seen.append(logits_NV.clone())
        return logits_NV, prompt_logprobs

    engine.runner.run = recording_run  # type: ignore[method-assign]
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0))
    engine.runner.run = run  # type: ignore[method-assign]
    return seen[-1][0]


def transformers_logits(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        output = model(torch.tensor([prompt]), use_cache=False)
    logits_V: Tensor = output.logits[0, -1].float()
    return logits_V


def test_logits_and_greedy_tokens_equal_transformers(
    published: Published, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="bezel"):
        engine = make_engine(published.path)
    reported = {record.message.split(":")[0] for record in caplog.records}
    assert reported == published.modalities
    for prompt in published.prompts:
        expected = transformers_logits(published.model, prompt)
        torch.testing.assert_close(first_logits(engine, prompt), expected, atol=1e-4, rtol=0)
    assert engine.generate(published.prompts, GREEDY) == published.answers
    assert len({tuple(answer) for answer in published.answers}) == len(PROMPT_LENGTHS)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_both_names_of_the_text_model(published: Published, prefix: str, tmp_path: Path) -> None:
    """Gemma 3 checkpoints were published with the one, Gemma 4 with the other."""
    tensors: dict[str, Tensor] = {}
    for shard in published.path.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            for old in ("language_model.model.", "model.language_model."):
                name = prefix + name.removeprefix(old) if name.startswith(old) else name
            tensors[name] = tensor
    assert any(name.startswith(prefix + "layers.") for name in tensors)
    (tmp_path / "config.json").write_bytes((published.path / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    engine = make_engine(tmp_path)
    assert engine.generate(published.prompts[-1:], GREEDY) == published.answers[-1:]


def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(
    published: Published, tmp_path: Path
) -> None:
    """Saved and run in bfloat16. Neither is exact; Bezel's error is of the size of transformers',
    and far smaller than the logits."""
    exact = published.model
    rounded = type(exact)(exact.config).bfloat16().eval()
    rounded.load_state_dict(exact.state_dict())
    rounded.save_pretrained(tmp_path)
    as_saved = type(exact)(exact.config).eval()
    as_saved.load_state_dict(rounded.state_dict())
    engine = make_engine(tmp_path, "bfloat16")
    for prompt in published.prompts:
        logits = first_logits(engine, prompt)
        assert logits.isfinite().all()
        expected = transformers_logits(as_saved, prompt)
        theirs = transformers_logits(rounded, prompt)
        error, their_error = (logits - expected).norm(), (theirs - expected).norm()
        assert error < 3 * their_error
        assert error < 0.1 * expected.norm()
    answers = engine.generate(published.prompts, GREEDY)
    assert [len(answer) for answer in answers] == [GREEDY.max_tokens] * len(PROMPT_LENGTHS)
