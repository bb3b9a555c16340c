"""Rotary embedding against complex multiplication, and against transformers at Gemma's sizes."""

import cmath

import pytest
import torch
from transformers import Gemma3TextConfig, Gemma4TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4TextRotaryEmbedding,
    apply_rotary_pos_emb,
)

from bezel.kernels.rotary import apply_rotary, rotary_frequencies, rotary_table, turned_pairs

POSITIONS = [0, 1, 2, 17, 1000, 131_071]


def naive(
    x: list[float], position: int, theta: float, num_pairs: int, factor: float
) -> list[float]:
    """Pairs (j, j + K/2) as complex numbers, the first J turned by their angles."""
    width, half = len(x), len(x) // 2
    turned = list(x)
    for j in range(num_pairs):
        angle = position * theta ** (-2 * j / width) / factor
        z = complex(x[j], x[j + half]) * cmath.exp(1j * angle)
        turned[j], turned[j + half] = z.real, z.imag
    return turned


def heads(width: int, num_heads: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(len(POSITIONS), num_heads, width, generator=generator)


def table(
    theta: float, width: int, num_pairs: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = rotary_frequencies(theta, width, num_pairs, factor)
    return rotary_table(torch.tensor(POSITIONS), frequencies)


@pytest.mark.parametrize(
    ("theta", "width", "num_pairs", "factor"),
    [
        (1e4, 16, 8, 1.0),
        (1e4, 256, 128, 1.0),
        (1e6, 256, 128, 8.0),
        (1e6, 32, 4, 1.0),
        (1e6, 32, 1, 2.0),
        (1e6, 512, 64, 1.0),
    ],
    ids=["default", "local", "linear-8", "proportional", "one-pair", "global"],
)
def test_each_pair_turns_by_its_angle(
    theta: float, width: int, num_pairs: int, factor: float
) -> None:
    x_THK = heads(width)
    y_THK = apply_rotary(x_THK, *table(theta, width, num_pairs, factor))
    expected = torch.tensor(
        [
            [naive(head, position, theta, num_pairs, factor) for head in token]
            for position, token in zip(POSITIONS, x_THK.tolist(), strict=True)
        ]
    )
    # A float32 angle of 131,071 radians is itself only good to 2^-7.
    torch.testing.assert_close(y_THK[:-1], expected[:-1], atol=2e-4, rtol=0)
    torch.testing.assert_close(y_THK[-1], expected[-1], atol=3e-2, rtol=0)


def test_pairs_beyond_the_turned_ones_stay_bit_for_bit() -> None:
    x_THK = heads(512).bfloat16()
    y_THK = apply_rotary(x_THK, *table(1e6, 512, 64, 1.0))
    for start in (64, 256 + 64):
        assert torch.equal(y_THK[..., start : start + 192], x_THK[..., start : start + 192])
    for start in (0, 256):
        assert not torch.equal(y_THK[..., start : start + 64], x_THK[..., start : start + 64])


def test_turned_pairs_are_the_turned_values_of_the_whole() -> None:
    x_THK, cos_sin = heads(32), table(1e6, 32, 4, 1.0)
    y_THK = apply_rotary(x_THK, *cos_sin)
    expected = torch.cat((y_THK[..., :4], y_THK[..., 16:20]), dim=-1)
    assert torch.equal(turned_pairs(x_THK, *cos_sin), expected)


def test_arithmetic_is_float32_whatever_the_dtype() -> None:
    x_THK, cos_sin = heads(16).bfloat16(), table(1e4, 16, 8, 1.0)
    y_THK = apply_rotary(x_THK, *cos_sin)
    assert y_THK.dtype == torch.bfloat16
    assert torch.equal(y_THK, apply_rotary(x_THK.float(), *cos_sin).bfloat16())


def test_equals_transformers_for_gemma4() -> None:
    """Local: head 256, theta 1e4. Global: head 512, theta 1e6, 64 of 256 pairs."""
    rotary = Gemma4TextRotaryEmbedding(Gemma4TextConfig(num_hidden_layers=6))
    for kind, theta, width, num_pairs in (
        ("sliding_attention", 1e4, 256, 128),
        ("full_attention", 1e6, 512, 64),
    ):
        x_THK = heads(width)
        cos, sin = rotary(x_THK, torch.tensor([POSITIONS]), layer_type=kind)
        expected = apply_rotary_pos_emb(x_THK[None], cos, sin, unsqueeze_dim=2)[0]
        y_THK = apply_rotary(x_THK, *table(theta, width, num_pairs, 1.0))
        torch.testing.assert_close(y_THK, expected, atol=1e-5, rtol=0)


def test_frequencies_equal_transformers_for_gemma3() -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=6, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    rotary = Gemma3RotaryEmbedding(config)
    torch.testing.assert_close(
        rotary_frequencies(1e6, 256, 128, 8.0), rotary.full_attention_inv_freq
    )
    torch.testing.assert_close(
        rotary_frequencies(1e4, 256, 128, 1.0), rotary.sliding_attention_inv_freq
    )
