"""What Bezel runs on: versions, system, CPU, memory, GPUs. Facts only, see `checks` for verdicts.

torch is imported where it is needed, as it may be what is broken. Names of hosts and users are left
out, so that all of it can be shown to others.
"""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bezel.engine.cpu_threads import num_threads

PACKAGES = (
    *("torch", "triton", "numba", "llvmlite", "numpy", "transformers", "tokenizers"),
    *("huggingface_hub", "safetensors", "gguf", "llguidance", "fastapi", "starlette", "uvicorn"),
    *("uvloop", "httptools", "httpx", "pydantic", "msgspec", "pyzmq", "prometheus-client"),
    *("jinja2", "PyYAML"),
)
CHECKOUT = Path(__file__).resolve().parents[2]
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

# Instructions that kernels have a use for, as Linux calls them on x86 and on ARM.
_CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "i8mm", "sve"),
)
_GIT_TIMEOUT_S = 10


def versions() -> dict[str, str]:
    """Of the packages that Bezel stands on; those that aren't installed are absent."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def operating_system() -> str:
    """Kernel, architecture and distribution."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{system}, {platform.freedesktop_os_release()['PRETTY_NAME']}"
    except (OSError, KeyError):
        return system


def cpu_name(cpuinfo: str) -> str:
    """As Linux tells it in /proc/cpuinfo."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_features(cpuinfo: str) -> list[str]:
    """Those that matter."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    there = set(found[1].split()) if found else set()
    return [name for name in _CPU_FEATURES if name in there]


def read_cpuinfo() -> str:
    """Empty where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cores() -> str:
    """How many there are, and how many of them are ours."""
    return f"{num_threads()} of {os.cpu_count()} cores for this process"


def memory_bytes() -> tuple[int, int]:
    """Available now, within the limit of a container, and in all."""
    import torch

    from bezel.engine.memory import DeviceMemory

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return DeviceMemory.of(torch.device("cpu")).free_bytes, total


def gpus() -> list[str]:
    """A line for each that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, "
            f"capability {properties.major}.{properties.minor}"
        )
    return lines


def gpu_driver() -> str | None:
    """The version of NVIDIA's kernel module, if it is loaded."""
    try:
        text = NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else text.splitlines()[0]


def commit(checkout: Path = CHECKOUT) -> str | None:
    """Of the sources that run, if they are a git checkout: the commit, and whether they were
    changed since."""
    if not (checkout / ".git").exists():
        return None
    head = _git(checkout, "rev-parse", "HEAD")
    if head is None:
        return None
    is_changed = _git(checkout, "--no-optional-locks", "status", "--porcelain", "-uno")
    return f"{head[:12]}, changed" if is_changed else head[:12]


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
