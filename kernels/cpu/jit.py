"""How kernels for CPUs are compiled, where machine code is kept, on how many threads it runs.

Numba compiles a kernel when it is first called with new types, which takes a second or several, and
keeps the result on disk for every later process. The folder's name is a digest of these sources:
code is never taken for that of another version. Folders that no process has used for a month are
removed.
"""

import hashlib
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

from bezel.kernels.jit import runs_triton

KEPT_S = 30 * 24 * 3600.0  # a folder of another version since it was last used
_DTYPES = (torch.bfloat16, torch.float32)
_PLAIN: ContextVar[bool] = ContextVar("_PLAIN", default=False)


def _cache_folder() -> Path:
    """A folder below `~/.cache/bezel`, or a temporary one where that can't be written."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    try:
        folder = Path.home() / ".cache" / "bezel" / name
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="bezel-"))
    remove_stale(folder)
    return folder


def remove_stale(used: Path) -> None:
    """Remove folders beside `used` whose process began longer than `KEPT_S` ago.

    Other processes may do so at the same time. One that still runs loses nothing but files: Numba
    takes a missing one for code that isn't there yet, and makes a missing folder anew.
    """
    oldest = time.time() - KEPT_S
    for folder in used.parent.glob("kernels-*"):
        try:
            is_stale = folder != used and folder.stat().st_mtime < oldest
        except OSError:  # somebody else was quicker
            continue
        if is_stale:
            shutil.rmtree(folder, ignore_errors=True)


def threading_layer() -> str:
    """OpenMP where it can be loaded: its threads are torch's own, one pool instead of two.

    Numba looks for the file `libgomp.so.1.0.0`, which torch brings under another name only, so a
    slim system may lack it; then Numba chooses, in the end threads of its own.
    """
    if sys.platform != "linux":
        return "default"
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return "default"
    return "omp"


numba.config.CACHE_DIR = str(_cache_folder())
numba.config.THREADING_LAYER = threading_layer()


def set_num_threads(num_threads: int) -> None:
    """Of kernels, and of torch's own operations beside them."""
    torch.set_num_threads(num_threads)
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))


def kernel(function: Callable[..., Any]) -> Any:
    """Compile what Python calls: it spreads its work over `prange(threads)`."""
    return numba.njit(nogil=True, parallel=True, cache=True, error_model="numpy")(function)


def device(function: Callable[..., Any]) -> Any:
    """Compile what only kernels call."""
    return numba.njit(nogil=True, error_model="numpy")(function)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute the references, for comparison."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def runs_numba(x: Tensor, *widths: int) -> bool:
    """Whether an operation on `x` runs its kernel for CPUs: all `widths` have to be whole lanes."""
    if not x.is_cpu or x.dtype not in _DTYPES or _PLAIN.get() or runs_triton(x):
        return False
    for width in widths:  # a generator would take longer than a small kernel
        if width % 16:
            return False
    return True
