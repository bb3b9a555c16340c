"""Softcap and edits against their formulas, one number at a time in float64."""

import math

import pytest
import torch

from bezel.kernels.logits import edit_logits, softcap


def test_softcap_is_close_to_a_line_first_and_ends_at_the_cap() -> None:
    x = torch.tensor([[0.0, 0.5, -3.0, 30.0, -45.0, 300.0, math.inf, -math.inf]])
    expected = [[30 * math.tanh(value / 30) for value in x[0].tolist()]]
    torch.testing.assert_close(softcap(x, 30.0), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_softcap_computes_in_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    x_NV = (torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    expected = (x_NV.double() / 50).tanh() * 50
    torch.testing.assert_close(softcap(x_NV, 50.0), expected.float(), rtol=1e-6, atol=1e-6)


def test_without_a_cap_logits_stay_what_they_are() -> None:
    x_NV = torch.randn(2, 5).bfloat16()
    assert softcap(x_NV, None) is x_NV


def test_edits_are_made_in_their_order_and_nothing_else_changes() -> None:
    """(x / or × penalty) − subtracted + bias, at positions in the second and the last row."""
    logits_NV = torch.arange(-10.0, 11.0).view(3, 7)
    positions_E = torch.tensor([7, 11, 20] + [-1] * 13)
    values_3E = torch.zeros(3, 16)
    values_3E[:, :3] = torch.tensor([[2.0, 2.0, 1.0], [0.5, 0.25, 0.0], [3.0, -1.0, -math.inf]])
    expected = logits_NV.clone()
    expected[1, 0] = -3.0 * 2 - 0.5 + 3
    expected[1, 4] = 1.0 / 2 - 0.25 - 1
    expected[2, 6] = -math.inf
    edit_logits(logits_NV, positions_E, values_3E)
    assert torch.equal(logits_NV, expected)
