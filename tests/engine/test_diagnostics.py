"""Checks of the machine: each says what is so, and what is broken doesn't break them."""

import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numba
import pytest
import torch

from bezel.engine.diagnostics import checks, facts
from bezel.engine.diagnostics.checks import Finding, Status, run_checks

CPUINFO = """\
processor	: 0
model name	: AMD EPYC 9R14
flags		: fpu sse2 avx2 avx512f avx512_vnni avx512_bf16 avx512vbmi2

processor	: 1
"""


def finding(monkeypatch: pytest.MonkeyPatch, name: str) -> Finding:
    """Of one check, as things are now."""
    one = MappingProxyType({name: checks._CHECKS[name]})
    with monkeypatch.context() as patch:
        patch.setattr(checks, "_CHECKS", one)
        [found] = run_checks()
    return found


def test_this_machine_can_serve() -> None:
    found = {finding.name: finding for finding in run_checks()}
    assert len(found) == len(checks._CHECKS)
    assert [f for f in found.values() if f.status is Status.FAIL] == []
    assert found["torch"].text == torch.__version__
    assert numba.config.CACHE_DIR in found["kernel cache"].text


def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = finding(monkeypatch, "torch")
    assert found.status is Status.FAIL and found.hint == "pip install 'bezel-serve[cpu]'"
    found = finding(monkeypatch, "device")
    assert found.status is Status.FAIL and found.text.startswith("can't be checked: ModuleNot")


def with_gpu(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    properties = SimpleNamespace(name="Some GPU", total_memory=80e9, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr("bezel.kernels.jit.architecture", lambda: architecture)


def test_a_gpu_without_kernels_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, "sm_75")
    found = finding(monkeypatch, "device")
    assert found.status is Status.FAIL
    assert found.text == "Some GPU, 80.0 GB, capability 7.5"
    assert found.hint == "Bezel has no kernel tiles for sm_75; --device cpu does without"
    with_gpu(monkeypatch, "sm_90")
    assert finding(monkeypatch, "device").status is Status.OK


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert finding(monkeypatch, "triton").status is Status.OK
    with_gpu(monkeypatch, "sm_90")
    assert finding(monkeypatch, "triton").status is Status.FAIL


def test_a_driver_that_torch_has_no_use_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    monkeypatch.setattr(facts, "NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = finding(monkeypatch, "device")
    assert found.status is Status.WARN and "535.104.05" in found.text and "for CPUs" in found.hint
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0" in finding(monkeypatch, "device").hint


def test_numbas_own_threads_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bezel.kernels.cpu.jit.threading_layer", lambda: "default")
    expected = Status.WARN if sys.platform == "linux" else Status.OK
    assert finding(monkeypatch, "numba").status is expected


def test_the_kernel_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "default_cache_root", lambda: tmp_path)
    folder = tmp_path / "kernels-1"
    folder.mkdir()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
    found = finding(monkeypatch, "kernel cache")
    assert found.status is Status.OK and found.hint.startswith("empty")
    (folder / "f.nbc").write_bytes(bytes(3_000_000))
    assert finding(monkeypatch, "kernel cache") == Finding(
        "kernel cache", Status.OK, f"{folder}, 3 MB"
    )
    monkeypatch.setattr(checks, "default_cache_root", lambda: tmp_path / "other")
    found = finding(monkeypatch, "kernel cache")
    assert found.status is Status.WARN and "can't be written" in found.hint


def refuse(*_: Any, **__: Any) -> Any:
    raise PermissionError


def test_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for name in ("kernel cache", "disk"):
        found = finding(monkeypatch, name)
        assert found.status is Status.WARN and "can't be written" in found.hint


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "memory_bytes", lambda: (10**9, 16 * 10**9))
    found = finding(monkeypatch, "memory")
    assert (found.status, found.text) == (Status.WARN, "1.0 GB available of 16.0 GB")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9 * 10**9))
    found = finding(monkeypatch, "disk")
    assert found.status is Status.WARN and found.text.startswith("9.0 GB free")


def test_the_default_model_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert finding(monkeypatch, "default model").status is Status.WARN


def test_cpus() -> None:
    assert facts.cpu_name(CPUINFO) == "AMD EPYC 9R14"
    assert facts.cpu_features(CPUINFO) == ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"]
    assert facts.cpu_features("") == []


def test_an_old_cpu_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "read_cpuinfo", lambda: CPUINFO.replace("avx2 ", ""))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert finding(monkeypatch, "cpu").status is Status.WARN


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert facts.commit(tmp_path) is None
    git(tmp_path, "init")
    assert facts.commit(tmp_path) is None, "there is none yet"
    file = tmp_path / "file"
    file.write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert facts.commit(tmp_path) == head[:12]
    file.write_text("2")
    assert facts.commit(tmp_path) == f"{head[:12]}, changed"


def test_facts_need_no_torch() -> None:
    code = "import sys; from bezel.engine.diagnostics import checks, facts\n"
    code += "facts.versions(), facts.cores()\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
