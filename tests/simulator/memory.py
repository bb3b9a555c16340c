"""What is known of each tensor's memory: who touched it when, and whether it holds anything yet.

Programs run one after another, so a counter that goes up with every program tells all: a cell's
`writer` and `reader` are the counts of the last program that wrote and of the first that read it in
its latest launch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from simulator.errors import KernelBug

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

MAX_TRACKED = 1 << 27  # elements; of larger tensors only bounds and bytes are watched


@dataclass
class Traffic:
    """Bytes that kernels moved between a tensor and their registers."""

    loaded: int = 0
    stored: int = 0


@dataclass
class Clock:
    """Counts programs; `now` goes up at a barrier too."""

    now: int = 0
    program: int = 0  # count at which the current program began
    launch: int = 0  # and the current launch

    def start_launch(self) -> None:
        self.launch = self.now + 1

    def start_program(self) -> None:
        self.now += 1
        self.program = self.now


class Memory:
    """One storage, cell by cell. A cell is as wide as the narrowest element that lies in it."""

    def __init__(self, storage: torch.UntypedStorage, cell_bytes: int) -> None:
        self.storage = storage  # held, so that its address isn't given to another tensor
        self.address = storage.data_ptr()
        self.cell_bytes = cell_bytes
        self.num_cells = storage.nbytes() // cell_bytes
        self.is_tracked = self.num_cells <= MAX_TRACKED
        size = self.num_cells if self.is_tracked else 0
        self.writer = np.zeros(size, np.int32)
        self.reader = np.zeros(size, np.int32)
        self.was_input = np.zeros(size, bool)  # read before a kernel wrote it
        self.is_undefined: np.ndarray | None = None  # where nothing was ever stored

    def refine(self, cell_bytes: int) -> None:
        """Make cells narrower, for a tensor of a smaller dtype in the same storage."""
        factor, self.cell_bytes = self.cell_bytes // cell_bytes, cell_bytes
        self.num_cells *= factor
        if self.is_tracked:
            self.writer, self.reader = self.writer.repeat(factor), self.reader.repeat(factor)
            self.was_input = self.was_input.repeat(factor)
            if self.is_undefined is not None:
                self.is_undefined = self.is_undefined.repeat(factor)

    def cells_of(self, x: torch.Tensor) -> slice:
        """The cells from the first to the last element of a tensor."""
        first = (x.data_ptr() - self.address) // self.cell_bytes
        return slice(first, first + extent_of(x) * x.element_size() // self.cell_bytes)

    def set_undefined(self, x: torch.Tensor, undefined: bool) -> None:
        if not self.is_tracked or (self.is_undefined is None and not undefined):
            return
        if self.is_undefined is None:
            self.is_undefined = np.zeros(self.num_cells, bool)
        self.is_undefined[self.cells_of(x)] = undefined

    def minimum_cells(self) -> int:
        """Cells read as inputs plus cells whose last value nothing read."""
        never_written = (self.reader > 0) & (self.writer == 0)
        is_final = (self.writer > 0) & (self.writer >= self.reader)
        return int((never_written | self.was_input).sum()) + int(is_final.sum())

    def load(self, cells: np.ndarray, name: str, clock: Clock) -> None:
        writer = self.writer[cells]
        last = int(writer.max(initial=0))
        if last >= clock.launch:
            if ((writer >= clock.launch) & (writer < clock.program)).any():
                raise KernelBug(f"race: {name} is read where another program of the launch wrote")
            if last == clock.now:
                raise KernelBug(
                    f"race: {name} is read back by the program that wrote it, no barrier"
                )
        if self.is_undefined is not None and self.is_undefined[cells].any():
            raise KernelBug(f"uninitialised read of {name}")
        is_first = self.reader[cells] < clock.launch
        if is_first.all():
            self.reader[cells] = clock.now
        elif is_first.any():
            self.reader[cells[is_first]] = clock.now

    def store(self, cells: np.ndarray, name: str, clock: Clock) -> None:
        if has_duplicates(cells):
            raise KernelBug(f"race: one store writes an element of {name} twice")
        writer, reader = self.writer[cells], self.reader[cells]
        if ((writer >= clock.launch) & (writer < clock.program)).any():
            raise KernelBug(f"race: two programs write the same element of {name}")
        if ((reader >= clock.launch) & (reader < clock.program)).any():
            raise KernelBug(f"race: {name} is written where another program of the launch read")
        self.was_input[cells] |= (writer == 0) & (reader > 0)
        self.writer[cells] = clock.now
        if self.is_undefined is not None:
            self.is_undefined[cells] = False


class View:
    """A tensor that kernels get a pointer to: what they may touch of a memory."""

    def __init__(self, x: torch.Tensor, memory: Memory, name: str, traffic: Traffic) -> None:
        self.memory, self.name, self.traffic = memory, name, traffic
        self.shape = tuple(x.shape)
        self.address = x.data_ptr()
        # From the first element to the last one, as integers.
        flat = x.detach().as_strided((extent_of(x),), (1,))
        self.numbers = flat.view(_INTEGERS[x.element_size()]).numpy()

    def elements(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which elements of `width` bytes lie at these addresses: all inside, and aligned."""
        offsets = addresses.view(np.int64) - self.address
        if offsets.size == 0:
            return offsets
        first, last = int(offsets.min()), int(offsets.max())
        if first < 0 or last + width > self.numbers.nbytes:
            raise KernelBug(
                f"out of bounds: elements {first // width} to {last // width} of {self.name}"
                f" {self.shape}, whose memory ends at {self.numbers.nbytes // width}"
            )
        if width > 1 and (offsets & (width - 1)).any():
            raise KernelBug(f"misaligned access to {self.name}")
        return offsets // width

    def cells(self, elements: np.ndarray, width: int) -> np.ndarray:
        """The memory's cells that elements of `width` bytes lie in."""
        if width < self.memory.cell_bytes:
            self.memory.refine(width)
        factor = width // self.memory.cell_bytes
        first = (self.address - self.memory.address) // self.memory.cell_bytes
        if factor == 1:
            return elements + first
        return (first + elements[:, None] * factor + np.arange(factor)).reshape(-1)


def extent_of(x: torch.Tensor) -> int:
    """Elements from a tensor's first to its last one, gaps included."""
    if x.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def has_duplicates(cells: np.ndarray) -> bool:
    steps = np.diff(cells)
    return not (steps > 0).all() and np.unique(cells).size != cells.size
