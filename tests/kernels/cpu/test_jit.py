"""Kernels run whether or not the system has the OpenMP library that Numba looks for; what is left
of other versions goes."""

import os
import subprocess
import sys
import time
from pathlib import Path

from bezel.kernels.cpu.jit import KEPT_S, remove_stale

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


def test_folders_that_nobody_used_for_long_are_removed(tmp_path: Path) -> None:
    now = time.time()
    ages_s = {
        "kernels-used": 2 * KEPT_S,
        "kernels-old": KEPT_S + 60,
        "kernels-young": KEPT_S - 60,
        "models": 2 * KEPT_S,
    }
    for name, age_s in ages_s.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "gemm.nbi").touch()
        os.utime(tmp_path / name, (now - age_s, now - age_s))
    remove_stale(tmp_path / "kernels-used")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["kernels-used", "kernels-young", "models"]


def test_a_start_counts_as_use(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from bezel.kernels.cpu import jit"]
    environment = {"HOME": str(tmp_path)}
    subprocess.run(command, env=environment, timeout=120, check=True)
    [folder] = (tmp_path / ".cache" / "bezel").glob("kernels-*")
    os.utime(folder, (0, 0))
    subprocess.run(command, env=environment, timeout=120, check=True)
    assert folder.stat().st_mtime > time.time() - 600
