"""Softcapped logits on CPUs, to what float32 can tell apart near the cap."""

import pytest
import torch

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.logits import softcap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width"), [(0, 64), (1, 4096 + 48), (3, 10_000)])
def test_softcap(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, width: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(width)
    x_NV = torch.full((num_rows, width + 16), torch.nan, dtype=dtype)[:, :width]
    x_NV.copy_(torch.randn(num_rows, width, generator=generator) * 40)
    x_NV[:, :4] = torch.tensor([1e30, -1e30, torch.inf, -torch.inf])
    y_NV = softcap(x_NV, 30.0)
    with plain_torch():
        expected_NV = softcap(x_NV.float(), 30.0)
    assert y_NV.dtype == torch.float32
    torch.testing.assert_close(y_NV, expected_NV, rtol=0, atol=30 * 2.0**-21)
    if num_rows:
        assert y_NV[0, :4].tolist() == [30.0, -30.0, 30.0, -30.0]
