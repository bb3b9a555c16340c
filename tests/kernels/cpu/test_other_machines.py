"""Kernels for CPUs without AVX-512: the same results from the instructions of an older one."""

import subprocess
import sys
from pathlib import Path

import pytest

from bezel.kernels.cpu.lanes import has_feature

# Numba reads these when it is imported, so it takes a process of its own.
HASWELL = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+sse4.2,+ssse3",
}
SCRIPT = """
import torch
from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.linear import linear
from bezel.kernels.packed import WeightFormat, pack_weight
from bezel.kernels.rms_norm import rms_norm

torch.manual_seed(0)


def both(compute):
    with plain_torch():
        expected = compute()
    found = compute()
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    print(float(error))


weight = torch.randn(128, 256)
for format in WeightFormat:
    packed = pack_weight(weight, format)
    x = torch.randn(7, 256).bfloat16()
    both(lambda: linear(x, packed, torch.float32))
x, scale = torch.randn(3, 256).bfloat16(), torch.rand(256)
both(lambda: rms_norm(x, scale, 1e-6))
q = torch.randn(2, 4, 64).bfloat16()
k, v = torch.randn(2, 8, 16, 1, 64).bfloat16()
table, lengths = torch.arange(8).view(2, 4), torch.tensor([50, 3])
both(lambda: decode_attention(q, k, v, table, lengths, 0.125, None, 64, 1))
"""


@pytest.mark.skipif(not has_feature("avx2"), reason="needs what it pretends to be")
def test_kernels_without_avx512(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command,
        env=HASWELL | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = list(map(float, done.stdout.split()))
    assert len(errors) == 5 and max(errors) < 1e-2
    assert max(errors[:3]) < 2e-4  # products, in float32
