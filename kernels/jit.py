"""Where Triton comes from, when its kernels run, and for which architecture tiles are chosen.

On a GPU every wrapper launches its kernel; on a CPU it runs the one of `cpu/`, or the torch
reference where that has none. Tests and the
compiler's table make the same launchers run on CPU tensors with `triton_on_cpu`: under Triton's
interpreter, or under a driver that only compiles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # no Triton for macOS and Windows: the references do without

    class _Absent:
        """Lets kernels be defined, never launched."""

        def jit(self, function: Any = None, **_: Any) -> Any:
            return self.jit if function is None else function

        def __getattr__(self, name: str) -> Any:
            return None

    triton = tl = _Absent()

__all__ = ["architecture", "runs_triton", "tile_family", "tl", "triton", "triton_on_cpu"]

_ON_CPU: ContextVar[str | None] = ContextVar("_ON_CPU", default=None)

# Whose tiles an architecture uses. Ada and consumer Blackwell have the same shared memory, 99 KiB.
_FAMILIES = {
    "sm_80": "sm_80",
    "sm_86": "sm_89",
    "sm_87": "sm_80",
    "sm_89": "sm_89",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_89",
    "sm_121": "sm_89",
    "gfx942": "gfx942",
    "gfx950": "gfx942",
}


@contextmanager
def triton_on_cpu(architecture: str = "sm_90") -> Iterator[None]:
    """Launch kernels for CPU tensors too, with the tiles of `architecture`."""
    token = _ON_CPU.set(architecture)
    try:
        yield
    finally:
        _ON_CPU.reset(token)


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on `x` launches its kernel; otherwise it computes its reference."""
    return x.is_cuda or _ON_CPU.get() is not None


def architecture() -> str:
    """What kernels are compiled for now, as `sm_90` or `gfx942`."""
    on_cpu = _ON_CPU.get()
    if on_cpu is not None:
        return on_cpu
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def tile_family() -> str:
    """The architecture whose tiles are used. Raises NotImplementedError for one without tiles."""
    name = architecture()
    if name not in _FAMILIES:
        raise NotImplementedError(f"Bezel has no kernel tiles for {name}")
    return _FAMILIES[name]
