"""Kernels for CPUs without AVX-512: the same results from the instructions of an older one."""

import subprocess
import sys
from pathlib import Path

import pytest

from bezel.kernels.cpu.lanes import has_feature

# Numba reads these when it is imported, so it takes a process of its own.
AVX2 = "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+sse4.2,+ssse3"
MACHINES = {
    "haswell": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2},
    "alderlake": {"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": f"{AVX2},+avxvnni"},
}
SCRIPT = """
import torch
from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.decode_attention import decode_attention
from bezel.kernels.linear import linear
from bezel.kernels.packed import Int4Values, WeightFormat, pack_weight
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
    for dtype in (torch.bfloat16, torch.float32):
        for num_rows in (10, 11):  # tiles of six, three, two rows and of one
            x = torch.randn(num_rows, 256).to(dtype)
            both(lambda: linear(x, packed, torch.float32))
codes = torch.full((64, 64), 15, dtype=torch.uint8)  # the largest sums
most = pack_weight(Int4Values(codes, torch.ones(64, 2), torch.zeros(64, 2)), WeightFormat.INT4)
for x in (torch.ones(3, 64), -torch.ones(3, 64)):
    both(lambda: linear(x, most))
x, scale = torch.randn(3, 256).bfloat16(), torch.rand(256)
both(lambda: rms_norm(x, scale, 1e-6))
q = torch.randn(2, 4, 64).bfloat16()
k, v = torch.randn(2, 8, 16, 1, 64).bfloat16()
table, lengths = torch.arange(8).view(2, 4), torch.tensor([50, 3])
both(lambda: decode_attention(q, k, v, table, lengths, 0.125, None, 64, 1))
"""


@pytest.mark.parametrize(("machine", "feature"), [("haswell", "avx2"), ("alderlake", "avxvnni")])
def test_kernels_without_avx512(machine: str, feature: str, tmp_path: Path) -> None:
    if not has_feature(feature):
        pytest.skip("needs what it pretends to be")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command,
        env=MACHINES[machine] | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = list(map(float, done.stdout.split()))
    assert len(errors) == 16
    assert all(error < 2e-4 for error in errors[:14])  # products, in float32; none is NaN
    assert all(error < 1e-2 for error in errors[14:])
