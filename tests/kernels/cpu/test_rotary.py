"""Tables of cosines and sines on CPUs, to the last digits of float32 at any position."""

import pytest
import torch

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.rotary import rotary_frequencies, rotary_table


@pytest.mark.parametrize(("theta", "factor"), [(1e4, 1.0), (1e6, 8.0)])
@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_of_the_same_angles(
    monkeypatch: pytest.MonkeyPatch, theta: float, factor: float, num_tokens: int
) -> None:
    """Angles are products in float32, as the reference's; their sines are good to 1e-7."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(num_tokens)
    positions_T = torch.randint(0, 1 << 18, (num_tokens,), generator=generator)
    frequencies_J = rotary_frequencies(theta, 256, 48, factor)
    angles_TJ = (positions_T[:, None].float() * frequencies_J).double()
    cos_TJ, sin_TJ = rotary_table(positions_T, frequencies_J)
    torch.testing.assert_close(cos_TJ.double(), angles_TJ.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin_TJ.double(), angles_TJ.sin(), rtol=0, atol=1e-7)


def test_every_quarter_of_the_circle() -> None:
    positions_T = torch.arange(64)
    frequencies_J = torch.linspace(0.01, 0.1, 16)
    with plain_torch():
        expected = rotary_table(positions_T, frequencies_J)
    for x_TJ, expected_TJ in zip(rotary_table(positions_T, frequencies_J), expected, strict=True):
        torch.testing.assert_close(x_TJ, expected_TJ, rtol=1e-6, atol=1e-7)


def test_position_zero_turns_nothing() -> None:
    cos_TJ, sin_TJ = rotary_table(torch.tensor([0]), torch.ones(16))
    assert cos_TJ.tolist() == [[1.0] * 16] and sin_TJ.tolist() == [[0.0] * 16]
