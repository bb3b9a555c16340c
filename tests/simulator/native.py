"""The kernel tests on a GPU: the same tests and CPU tensors, but kernels that are compiled.

`install` takes the place of the simulator. At each launch the storages of its CPU tensors are
copied to the GPU, the kernel runs there on the same views of them, and all are copied back:

    host      storage ─┬─ k_cache        GPU       copy ─┬─ k_cache: same offset, same strides
                       └─ v_cache                        └─ v_cache

Tiles are the GPU's own, whatever architecture a test names. Nothing is counted: a test that reads a
counter runs to its end, since it may compare values too, but then counts as skipped. Tests that put
bugs into kernels are skipped at once: a bug may take the GPU down.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from simulator import mutation
from simulator.allocations import Allocations
from simulator.errors import KernelBug
from simulator.memory import MAX_TRACKED
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from bezel.kernels import jit

__all__ = ["KernelBug", "Watch", "install", "launching_on", "skip_mutations", "watched"]

MAX_BYTES = 6 << 30  # of a storage; tests of large offsets touch few pages of far more memory
NOT_COUNTED = "ran, but bytes are counted under the interpreter only"
NO_BUGS = "bugs are put into kernels under the interpreter only"

Run = Callable[..., Any]


class Copies:
    """Device copies of the storages that one launch uses, each made once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, x: Tensor) -> Tensor:
        """The view of a copy that `x` is of its storage; of a GPU tensor, itself."""
        if x.device.type != "cpu":
            return x
        copy = self._copy(x.untyped_storage()).untyped_storage()
        empty = torch.empty(0, dtype=x.dtype, device=self._device)
        return empty.set_(copy, x.storage_offset(), x.shape, x.stride())

    def _copy(self, storage: torch.UntypedStorage) -> Tensor:
        if storage.nbytes() > MAX_BYTES:
            pytest.skip(f"{storage.nbytes() >> 30} GiB are not copied to the GPU")
        if storage.data_ptr() not in self._copies:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._copies[storage.data_ptr()] = (host, host.to(self._device, copy=True))
        return self._copies[storage.data_ptr()][1]

    def bring_back(self) -> None:
        for host, copy in self._copies.values():
            host.copy_(copy)


def launching_on(device: torch.device, run: Run) -> Run:
    """A kernel's method `run`, for launches with CPU tensors that should take place on `device`."""
    lost: list[str] = []  # after an illegal access a GPU refuses all that follows

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if lost:
            raise RuntimeError(lost[0])
        with _disable_current_modes():
            copies = Copies(device)
            args, kwargs = tree_map_only(Tensor, copies.of, (args, kwargs))
            result = run(self, *args, grid=grid, warmup=warmup, **kwargs)
            try:
                copies.bring_back()
            except RuntimeError as error:
                lost.append(f"the GPU was lost in {self.__name__}: {error}")
                raise RuntimeError(lost[0]) from error
        return result

    return launch


class Poison(Allocations):
    """Fills what `torch.empty` returns with numbers that no kernel computes: of floats, a NaN whose
    bits no arithmetic gives."""

    def poison(self, x: Tensor) -> None:
        if 0 < x.numel() <= MAX_TRACKED and x.dtype != torch.bool:
            _bits(x).fill_(_poison(x))

    def count(self, x: Tensor) -> int:
        return int((_bits(x) == _poison(x)).sum())

    def _define(self, value: Any) -> None:
        """What torch writes itself needs no note: it can be seen."""


def _bits(x: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(kinds[x.element_size()])


def _poison(x: Tensor) -> int:
    return 0x7FE5A5A5A5A5A5A5 >> 64 - 8 * x.element_size()


class Uncounted:
    """A number, or several, that nobody knows: whatever a test claims of it may be true."""

    were_read = False

    def __getattr__(self, name: str) -> "Uncounted":
        return self

    def __getitem__(self, key: object) -> "Uncounted":
        return self

    def _is_true(self, other: object) -> bool:
        return True

    def _is_unknown(self, other: object) -> "Uncounted":
        return self

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _is_true  # type: ignore
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _is_unknown


class Watch:
    """Knows what nobody wrote to, and no more."""

    def __init__(self) -> None:
        self.allocations = Poison(self)  # type: ignore[arg-type]

    def unwritten(self, x: Tensor) -> int:
        """Elements of a tensor from `torch.empty` that still are what it was filled with."""
        return self.allocations.count(x)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        Uncounted.were_read = True
        return Uncounted()


def skip_if_counters_were_read() -> None:
    """Called when a test has passed."""
    if Uncounted.were_read:
        Uncounted.were_read = False
        pytest.skip(NOT_COUNTED)


@contextmanager
def watched(
    names: Mapping[str, Tensor] | None = None, uninitialised: Sequence[Tensor] = (), **options: Any
) -> Iterator[Watch]:
    """Tensors made by `torch.empty` within, and `uninitialised` ones, begin as `Poison`."""
    watch = Watch()
    for x in uninitialised:
        watch.allocations.poison(x)
    with watch.allocations:
        yield watch


@contextmanager
def mutated(module: ModuleType, *change: Any, **options: Any) -> Iterator[ModuleType]:
    pytest.skip(NO_BUGS)
    yield module


def skip_mutations(items: list[pytest.Item]) -> None:
    """Skip tests that use `mutated` before they run: each would first test all without a bug."""
    for item in items:
        code = getattr(getattr(item, "function", None), "__code__", None)
        if code is not None and "mutated" in code.co_names:
            item.add_marker(pytest.mark.skip(reason=NO_BUGS))


def install(device: str) -> None:
    """Have the tests that are imported from now on run their kernels on `device`.

    On "cpu", which is a rehearsal, kernels are interpreted, on copies in the same memory.
    """
    if device == "cpu":
        from triton.runtime.interpreter import InterpretedFunction as Kernel

        architecture = "sm_90"
    else:
        from triton.runtime.jit import JITFunction as Kernel

        architecture = jit.architecture()
    Kernel.run = launching_on(torch.device(device), Kernel.run)
    on_cpu = jit.triton_on_cpu
    jit.triton_on_cpu = lambda named="": on_cpu(architecture)
    mutation.mutated = mutated
    sys.modules["simulator.watch"] = sys.modules[__name__]
