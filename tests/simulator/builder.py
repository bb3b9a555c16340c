"""The interpreter's operations on memory, watched."""

from typing import TYPE_CHECKING, Any

import numpy as np
import triton.language as tl
from simulator.errors import KernelBug
from simulator.numerics import from_float32, numpy_dtype
from simulator.pointers import VIEW, Pointers
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

if TYPE_CHECKING:
    from simulator.watch import Watch


class Simulator(Pointers):
    """Loads, stores and dots, reported to the watch of the moment if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.watch: Watch | None = None

    def create_load(self, ptr: TensorHandle, *policy: Any) -> TensorHandle:
        return self._load(ptr, np.ones(ptr.data.shape, bool), None)

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *a: Any, **k: Any
    ) -> TensorHandle:
        return self._load(ptrs, getattr(mask, "data", mask), other)

    def create_store(self, ptr: TensorHandle, val: TensorHandle, *policy: Any) -> None:
        self._store(ptr, val, np.ones(ptr.data.shape, bool))

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *a: Any, **k: Any
    ) -> None:
        self._store(ptrs, value, getattr(mask, "data", mask))

    def create_atomic_rmw(self, *args: Any) -> TensorHandle:
        raise KernelBug("atomics make results depend on the order of programs")

    create_atomic_cas = create_atomic_rmw

    def create_barrier(self) -> None:
        if self.watch is not None:
            self.watch.clock.now += 1

    def create_assert(self, condition: TensorHandle, message: str, *rest: Any) -> None:
        if not condition.data.all():
            raise KernelBug(message)

    def create_dot(self, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        if self.watch is not None:
            self.watch.on_dot(2 * a.data.size * b.data.shape[-1])
        return super().create_dot(a, b, *rest)

    def _load(
        self, ptrs: TensorHandle, mask: np.ndarray, other: TensorHandle | None
    ) -> TensorHandle:
        dtype = ptrs.get_element_ty()
        # What a GPU puts in masked lanes is anyone's guess, so let it be what hurts most.
        fill = poison(dtype) if other is None else other.data
        shape, kind = ptrs.data.shape, numpy_dtype(dtype)
        if self.watch is None:
            fill = np.broadcast_to(fill, shape)
            data = interpreter._interpreter.load(ptrs.data, mask, fill, kind)
            return TensorHandle(data, dtype)
        numbers = self.watch.load(ptrs.attr.get(VIEW), _active(ptrs.data, mask), kind)
        if numbers.size == ptrs.data.size:
            return TensorHandle(numbers.reshape(shape), dtype)
        data = np.full(shape, fill, kind)
        data[np.broadcast_to(mask, shape)] = numbers
        return TensorHandle(data, dtype)

    def _store(self, ptrs: TensorHandle, value: TensorHandle, mask: np.ndarray) -> None:
        kind = numpy_dtype(ptrs.get_element_ty())
        if self.watch is not None:
            self.watch.store(ptrs.attr.get(VIEW), _active(ptrs.data, mask), kind)
        interpreter._interpreter.store(ptrs.data, value.data.astype(kind, copy=False), mask)


def poison(dtype: tl.dtype) -> np.ndarray:
    """NaN, or an integer that is no sensible index."""
    if dtype.is_floating():
        return from_float32(np.array([np.nan], np.float32), dtype)
    kind = numpy_dtype(dtype)
    return np.ones(1, bool) if kind == np.bool_ else np.array([np.iinfo(kind).max // 3], kind)


def _active(addresses: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Addresses of the lanes that take part, in a row."""
    if mask.shape != addresses.shape:
        mask = np.broadcast_to(mask, addresses.shape)
    return np.ascontiguousarray(addresses).reshape(-1) if mask.all() else addresses[mask]
