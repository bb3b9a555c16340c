"""Scaled embeddings, alone and with the first norm, row by row."""

import math

import torch

from bezel.kernels.embedding import embed_and_norm, scaled_embedding


def test_rows_are_looked_up_and_scaled() -> None:
    weight_VD = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    x_TD = scaled_embedding(torch.tensor([10, 0, 10, 4]), weight_VD, 3.0)
    expected = [[value * 3.0 for value in weight_VD[token].tolist()] for token in (10, 0, 10, 4)]
    torch.testing.assert_close(x_TD, torch.tensor(expected), rtol=0, atol=0)


def test_bfloat16_is_rounded_once() -> None:
    """129/128 · 1.5 = 387/256 lies between two bfloat16, 193/128 and 194/128; the even one wins."""
    x_TD = scaled_embedding(torch.tensor([0]), torch.tensor([[129 / 128]]).bfloat16(), 1.5)
    assert x_TD.dtype == torch.bfloat16
    assert x_TD.item() == 194 / 128


def test_the_norm_is_that_of_the_scaled_row() -> None:
    """Without eps the scale would cancel: it counts beside small values."""
    weight_VD = torch.tensor([[1.0, -2.0], [3e-4, 4e-4]])
    x_TD, z_TD = embed_and_norm(
        torch.tensor([1, 0]), weight_VD, 2.0, torch.tensor([0.5, 3.0]), 1e-6
    )
    torch.testing.assert_close(x_TD, torch.tensor([[6e-4, 8e-4], [2.0, -4.0]]))
    small, large = math.sqrt((6e-4**2 + 8e-4**2) / 2 + 1e-6), math.sqrt((4 + 16) / 2 + 1e-6)
    expected = [
        [6e-4 / small * 0.5, 8e-4 / small * 3.0],
        [2 / large * 0.5, -4 / large * 3.0],
    ]
    torch.testing.assert_close(z_TD, torch.tensor(expected))


def test_no_tokens() -> None:
    x_TD, z_TD = embed_and_norm(
        torch.empty(0, dtype=torch.int64), torch.ones(3, 4), 2.0, torch.ones(4), 1e-6
    )
    assert x_TD.shape == z_TD.shape == (0, 4)
