"""Kernels run on CPU tensors, and everything they do to memory is looked at.

    with watched(names={"q": q}, uninitialised=[out]) as watch:
        launch_the_kernel(q, out)
    assert watch.by_name["q"].loaded == q.nbytes

Raises `KernelBug` for accesses out of bounds, races between programs of a launch, reads of memory
that nothing was stored to, and arithmetic that is not done in float32.
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from simulator.allocations import Allocations
from simulator.builder import Simulator
from simulator.errors import KernelBug
from simulator.launch import install
from simulator.memory import Clock, Memory, Traffic, View
from torch import Tensor

__all__ = ["KernelBug", "Launch", "Watch", "watched"]

_SIMULATOR = Simulator()
install(_SIMULATOR)


@dataclasses.dataclass
class Launch:
    """One launch of a kernel, and what it did."""

    kernel: str
    grid: tuple[int, int, int]
    bytes_loaded: int = 0
    bytes_stored: int = 0
    dot_flops: int = 0


class Watch:
    """What kernels did while they were watched."""

    def __init__(self, names: Mapping[str, Tensor], shuffle: bool, seed: int) -> None:
        self.launches: list[Launch] = []
        self.by_name: dict[str, Traffic] = {}
        self.clock = Clock()
        self._memories: dict[int, Memory] = {}
        self._views: dict[tuple[Any, ...], View] = {}
        self._names = dict(names)
        self._random = random.Random(seed) if shuffle else None
        for name in names:
            self.by_name[name] = Traffic()

    @property
    def num_launches(self) -> int:
        return len(self.launches)

    @property
    def num_programs(self) -> int:
        return sum(x * y * z for x, y, z in (launch.grid for launch in self.launches))

    @property
    def bytes_loaded(self) -> int:
        return sum(launch.bytes_loaded for launch in self.launches)

    @property
    def bytes_stored(self) -> int:
        return sum(launch.bytes_stored for launch in self.launches)

    @property
    def dot_flops(self) -> int:
        return sum(launch.dot_flops for launch in self.launches)

    @property
    def minimum_bytes(self) -> int:
        """Every input once and every final output once; what kernels only pass on is free."""
        return sum(m.minimum_cells() * m.cell_bytes for m in self._memories.values())

    @property
    def traffic_ratio(self) -> float:
        """Bytes moved, as a multiple of `minimum_bytes`."""
        return (self.bytes_loaded + self.bytes_stored) / self.minimum_bytes

    def unwritten(self, x: Tensor) -> int:
        """Elements of `x` that no kernel has stored to."""
        memory = self.memory(x)
        step = x.element_size() // memory.cell_bytes
        first = (x.data_ptr() - memory.address) // memory.cell_bytes
        strides = [stride * step for stride in x.stride()]
        writer = torch.from_numpy(memory.writer).as_strided(x.shape, strides, first)
        return int((writer == 0).sum())

    def memory(self, x: Tensor) -> Memory:
        """The record of a tensor's storage."""
        storage = x.untyped_storage()
        memory = self._memories.get(storage.data_ptr())
        if memory is None:
            memory = self._memories[storage.data_ptr()] = Memory(storage, x.element_size())
        if x.element_size() < memory.cell_bytes:
            memory.refine(x.element_size())
        return memory

    def known_memory(self, x: Tensor) -> Memory | None:
        """The record of a tensor's storage if there is one already."""
        return self._memories.get(x.untyped_storage().data_ptr())

    def view(self, x: Tensor, default_name: str) -> View:
        """The record of a tensor that a kernel is launched with."""
        memory = self.memory(x)
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        view = self._views.get(key)
        if view is None:
            name = self._name_of(x, default_name)
            traffic = self.by_name.setdefault(name, Traffic())
            view = self._views[key] = View(x, memory, name, traffic)
        return view

    def _name_of(self, x: Tensor, default_name: str) -> str:
        for name, named in self._names.items():
            if named.data_ptr() == x.data_ptr():
                return name
        name, count = default_name, 1
        while name in self.by_name:
            count += 1
            name = f"{default_name}_{count}"
        self._names[name] = x
        return name

    def on_launch(
        self, kernel: str, grid: tuple[int, int, int], programs: list[tuple[int, int, int]]
    ) -> list[tuple[int, int, int]]:
        """Note a launch; returns its programs in the order to run them in."""
        self.launches.append(Launch(kernel, grid))
        self.clock.start_launch()
        if self._random is not None:
            self._random.shuffle(programs)
        return programs

    def load(self, view: View | None, addresses: np.ndarray, kind: np.dtype) -> np.ndarray:
        """The numbers at these addresses, if they may be read."""
        elements = _known(view).elements(addresses, kind.itemsize)
        view.traffic.loaded += elements.size * kind.itemsize
        self.launches[-1].bytes_loaded += elements.size * kind.itemsize
        if view.memory.is_tracked:
            cells = view.cells(elements, kind.itemsize)
            view.memory.load(cells, view.name, self.clock)
        return view.numbers.view(kind).take(elements)

    def store(self, view: View | None, addresses: np.ndarray, kind: np.dtype) -> None:
        """Note that numbers are stored at these addresses, if they may be."""
        elements = _known(view).elements(addresses, kind.itemsize)
        view.traffic.stored += elements.size * kind.itemsize
        self.launches[-1].bytes_stored += elements.size * kind.itemsize
        if view.memory.is_tracked:
            cells = view.cells(elements, kind.itemsize)
            view.memory.store(cells, view.name, self.clock)

    def on_dot(self, flops: int) -> None:
        self.launches[-1].dot_flops += flops


def _known(view: View | None) -> View:
    if view is None:
        raise KernelBug("a pointer that was not made from a tensor of this launch")
    return view


@contextmanager
def watched(
    names: Mapping[str, Tensor] | None = None,
    uninitialised: Sequence[Tensor] = (),
    shuffle: bool = True,
    seed: int = 0,
    int_overflow: bool = False,
) -> Iterator[Watch]:
    """Watch the kernels launched within.

    `names` are for messages and `by_name`; other tensors are called like the kernel's parameter.
    Tensors made by `torch.empty` within, and those of `uninitialised`, hold NaN (or huge integers)
    and may not be read before something is stored to them. Programs run in an order drawn from
    `seed`, unless `shuffle` is off. `int_overflow` checks 32-bit additions and multiplications.
    """
    watch = Watch(names or {}, shuffle, seed)
    allocations = Allocations(watch)
    for x in uninitialised:
        allocations.poison(x)
    before, options = _SIMULATOR.watch, _SIMULATOR.options
    _SIMULATOR.watch = watch
    _SIMULATOR.options = dataclasses.replace(options, sanitize_overflow=int_overflow)
    try:
        with allocations:
            yield watch
    finally:
        _SIMULATOR.watch, _SIMULATOR.options = before, options
