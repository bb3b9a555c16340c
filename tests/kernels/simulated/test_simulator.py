"""Every check of the simulator, by a kernel with that bug and one without."""

import pytest
import torch
from bezel.kernels.jit import tl, triton
from simulator.watch import KernelBug, watched


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + o, x * factor, mask=o < n)


def test_bytes() -> None:
    x = torch.randn(100).bfloat16()
    with watched({"x": x}) as watch:
        y = torch.empty_like(x)
        scale_kernel[(7,)](x, y, 100, 2.0, BLOCK=16, num_warps=1)
    assert torch.equal(y, x * 2)
    assert watch.by_name["x"].loaded == 200
    assert watch.by_name["y"].stored == 200
    assert watch.minimum_bytes == 400 and watch.traffic_ratio == 1
    assert watch.unwritten(y) == 0
    with watched(), pytest.raises(KernelBug, match="out of bounds"):
        scale_kernel[(8,)](x, torch.empty(99).bfloat16(), 100, 2.0, BLOCK=16)
