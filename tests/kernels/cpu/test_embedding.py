"""Embeddings on CPUs equal their references, alone and with the norm."""

import pytest
import torch
from torch import Tensor

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.embedding import embed_and_norm, scaled_embedding

HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


pytestmark = pytest.mark.usefixtures("three_threads")


def ids_and_table(num_tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A table with NaN between its rows, and ids from its first to its last."""
    generator = torch.Generator().manual_seed(width)
    table_VD = torch.full((50, width + 8), torch.nan, dtype=dtype)[:, :width]
    table_VD.copy_(torch.randn(50, width, generator=generator))
    ids_T = torch.randint(0, 50, (num_tokens,), generator=generator)
    ids_T[:1], ids_T[1:2] = 49, 0
    return ids_T, table_VD


@pytest.mark.parametrize("dtype", HALF_UNIT)
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 16), (1, 640), (5, 48), (150, 640)])
def test_scaled_embedding(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    """Exact: one product, rounded."""
    ids_T, table_VD = ids_and_table(num_tokens, width, dtype)
    scale = torch.tensor(width**0.5, dtype=dtype).item()
    x_TD = scaled_embedding(ids_T, table_VD, scale)
    assert x_TD.dtype == dtype
    assert torch.equal(x_TD, table_VD[ids_T] * scale)


@pytest.mark.parametrize("dtype", HALF_UNIT)
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 16), (1, 640), (5, 48), (150, 640)])
def test_embed_and_norm(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    """The norm is that of the embedding as it was rounded."""
    ids_T, table_VD = ids_and_table(num_tokens, width, dtype)
    norm_weight_D = torch.rand(width, generator=torch.Generator().manual_seed(1))
    x_TD, z_TD = embed_and_norm(ids_T, table_VD, 7.5, norm_weight_D, 1e-6)
    with plain_torch():
        expected_TD, _ = embed_and_norm(ids_T, table_VD, 7.5, norm_weight_D, 1e-6)
        floats = (torch.arange(num_tokens), x_TD.float(), 1.0, norm_weight_D, 1e-6)
        _, expected_z_TD = embed_and_norm(*floats)
    assert torch.equal(x_TD, expected_TD) and z_TD.dtype == dtype
    rtol = HALF_UNIT[dtype] + 1e-5
    torch.testing.assert_close(z_TD.float(), expected_z_TD, rtol=rtol, atol=1e-6)
