"""A Triton driver that compiles whatever is launched, runs nothing and needs no GPU.

Triton asks its driver for the target, compiles, has the binary loaded and calls the launcher. This
driver names any target it is told to, loads nothing, and its launcher only notes who launched. So
the real wrappers can be called with tensors on torch's meta device, which have shapes, strides and
alignment but no memory, and what gets compiled is what a GPU would be given: the same tiles, the
same constants, the same proofs of divisibility.

Kernels without a matrix product are as simple on one architecture as on the other; to save time
they are compiled for two of them only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

from bezel.kernels.jit import triton_on_cpu

COMPILE_ALL = ("sm_90", "gfx942")  # on other architectures, what multiplies matrices
# NVIDIA's all have the same tiles in float32, and none has less memory than Ada.
COMPILE_FLOAT32 = ("sm_89", "sm_90", "gfx942")


@dataclass
class Kernel:
    """One compiled specialisation: Triton's source and metadata, and its files by suffix.

    `users` are the model and the kind of step that launched it.
    """

    source: Any
    metadata: dict[str, Any]
    files: dict[str, Path]
    users: set[tuple[str, str]] = field(default_factory=set)


class CompilingDriver:
    """Takes the place of `triton.runtime.driver.active`; `user` is who launches now."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.kernels: dict[str, Kernel] = {}
        self.user = ("", "")
        self.utils = self  # where Triton looks for the methods about devices and binaries

    def get_current_target(self) -> GPUTarget:
        if self.architecture.startswith("gfx"):
            return GPUTarget("hip", self.architecture, 64)
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.architecture  # Triton remembers kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # the gate has a better message than Triton's error

    def is_left_out(self, *, fn: Any, **_: Any) -> bool:
        """Triton's hook before it compiles: whether it should not, nor launch."""
        return self.architecture not in COMPILE_ALL and not multiplies(fn.jit_function)

    def keep(self, *, src: Any, metadata: Any, metadata_group: Any, **_: Any) -> None:
        """Triton's listener, called with every kernel that it has compiled."""
        files = {Path(name).suffix[1:]: Path(path) for name, path in metadata_group.items()}
        self.kernels.setdefault(metadata["hash"], Kernel(src, metadata, files))

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, most threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(width: int, height: int, depth: int, *_: Any) -> None:
            if width * height * depth:
                self.kernels[metadata.hash].users.add(self.user)

        return launch


@contextmanager
def compiling_for(architecture: str) -> Iterator[CompilingDriver]:
    """Launches for tensors on any device compile for `architecture`, and do nothing else."""
    driver = CompilingDriver(architecture)
    triton_driver.set_active(driver)
    with triton_on_cpu(architecture), knobs.compilation.scope(), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = driver.is_left_out
        knobs.compilation.listener = driver.keep
        yield driver


def multiplies(function: JITFunction) -> bool:
    """Whether a kernel, or a function that it calls, has a product of matrices."""
    if "tl.dot(" in function.src:
        return True
    known = [function.fn.__globals__.get(name) for name in function.fn.__code__.co_names]
    return any(isinstance(callee, JITFunction) and multiplies(callee) for callee in known)
