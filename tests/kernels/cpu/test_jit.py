"""Kernels run whether or not the system has the OpenMP library that Numba looks for."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.modules["numba.np.ufunc.omppool"] = None  # importing it fails
import numba, torch
from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.cpu.program import threads_run_together
from bezel.kernels.rms_norm import rms_norm

x, weight = torch.randn(400, 640), torch.rand(640)
with plain_torch():
    expected = rms_norm(x, weight, 1e-6)
assert torch.allclose(rms_norm(x, weight, 1e-6), expected, atol=1e-5)
assert threads_run_together()
print(numba.threading_layer())
"""


def test_a_system_without_libgomp(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command,
        env={"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() != "omp"
