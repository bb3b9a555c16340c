"""Operations of CPU kernels: run at once, or recorded to be run again and again as one program.

An operation is a function of the rows [first, last) of its work and of numbers: addresses, sizes,
factors. Python calls it itself where there is little to do, as starting threads takes longer than
the norms of some rows; otherwise a kernel gives each thread its share.

While a `Recording` is active nothing is computed. Each operation is written down with its numbers
instead, and memory comes from an arena that goes on to belong to the program. What a recorded step
computes may depend on values in memory, never on anything that Python would have to look at:
torch's own operations, other than views, end the recording.
"""

import ctypes
import weakref
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ALIGNMENT = 64
_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.new_empty.default,
}
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.unsqueeze.default,
    _aten.unbind.int,
    _aten.split.Tensor,
    _aten.alias.default,
    _aten.detach.default,
    _aten.as_strided.default,
    _aten._local_scalar_dense.default,  # of weights
}


class CannotRecord(Exception):
    """The step does something that only Python can."""


@dataclass(frozen=True, slots=True)
class Operation:
    """`alone(first, last, *numbers)` and `shared(threads, num_rows, *numbers)` do the same; `name`
    is the operation's in a program, if it has one."""

    name: str
    alone: Callable[..., None]
    shared: Callable[..., None]


@dataclass(frozen=True, slots=True)
class Launch:
    name: str
    num_rows: int
    numbers: tuple[Any, ...]


_RECORDING: "ContextVar[Recording | None]" = ContextVar("_RECORDING", default=None)


def launch(operation: Operation, num_rows: int, is_little: bool, numbers: tuple[Any, ...]) -> None:
    """Run an operation on its rows, or write it down."""
    recording = _RECORDING.get()
    if recording is not None:
        recording.add(operation.name, num_rows, numbers)
    elif is_little:
        operation.alone(0, num_rows, *numbers)
    else:
        operation.shared(torch.get_num_threads(), num_rows, *numbers)


def active_recording() -> "Recording | None":
    return _RECORDING.get()


class Arena:
    """Memory of recorded steps, of which only one runs at a time.

    Like an allocator it gives out again what has been released, by address, first fit; `reset`
    starts over for another step. What was given out before stays with the steps recorded by then.
    """

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._end = num_bytes
        self.reset()

    def reset(self) -> None:
        start = -self._memory.data_ptr() % _ALIGNMENT
        self._free = [(start, self._end - start)]

    def take(self, num_bytes: int) -> Any:
        """A buffer that returns to the arena when nothing refers to it any more.

        Raises:
            CannotRecord: the arena is too small.
        """
        size = max(_ALIGNMENT, -(-num_bytes // _ALIGNMENT) * _ALIGNMENT)
        for i, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[i : i + 1] = [(start + size, length - size)] if length > size else []
                buffer = (ctypes.c_char * size).from_address(self._memory.data_ptr() + start)
                weakref.finalize(buffer, self._release, start, size, self._free)
                return buffer
        raise CannotRecord(f"no {size} bytes left")

    def _release(self, start: int, size: int, free: list[tuple[int, int]]) -> None:
        free.append((start, size))
        free.sort()
        merged: list[tuple[int, int]] = []
        for begin, length in free:
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        free[:] = merged


class Recording(TorchDispatchMode):
    """Context in which launches are written down."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._tokens: list[Token[Recording | None]] = []
        self._arena = arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its compiler, for half a second, to be told to leave us alone."""
        return False

    def add(self, name: str, num_rows: int, numbers: tuple[Any, ...]) -> None:
        self.launches.append(Launch(name, num_rows, numbers))

    def __enter__(self) -> "Recording":
        self._tokens.append(_RECORDING.set(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _RECORDING.reset(self._tokens.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALLOCATIONS:
            return self._allocate(func(*args, **{**(kwargs or {}), "device": "meta"}))
        if func in _VIEWS:
            return func(*args, **(kwargs or {}))
        with self:  # one made of others, or not
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is NotImplemented:
            raise CannotRecord(str(func))
        return parts

    def _allocate(self, like: Tensor) -> Tensor:
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        buffer = self._arena.take(like.numel() * like.element_size())
        flat = torch.frombuffer(buffer, dtype=like.dtype, count=like.numel())
        return flat.view(like.shape)
