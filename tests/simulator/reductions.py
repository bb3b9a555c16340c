"""Reductions and scans over whole tiles; the stock interpreter combines numbers one by one."""

from typing import Any

import numpy as np
import triton.language as tl
from simulator.errors import KernelBug
from simulator.numerics import SMALL_FLOATS
from triton.runtime import interpreter


def install() -> None:
    interpreter.ReduceOps = Reduce
    interpreter.ScanOps = Scan


class Tiles(interpreter.ReduceScanOpInterface):
    """What reductions and scans have in common."""

    def check_tensor(self, input: tuple[tl.tensor, ...]) -> None:
        super().check_tensor(input)
        for x in input:
            if x.dtype.name in SMALL_FLOATS:
                raise KernelBug(f"reduction of {x.dtype}: cast to float32 first")

    def combine(
        self, input: tuple[tl.tensor, ...], left: list[np.ndarray], right: list[np.ndarray]
    ) -> list[np.ndarray]:
        """The combining function of a kernel, on tiles instead of single numbers."""
        tiles = [self.to_tensor(x, like.dtype) for x, like in zip(left, input, strict=True)]
        tiles += [self.to_tensor(x, like.dtype) for x, like in zip(right, input, strict=True)]
        result = self.combine_fn(*tiles)
        if not isinstance(result, tuple | tl.tuple):
            result = (result,)
        return [x.handle.data for x in result]


class Reduce(Tiles, interpreter.ReduceOps):
    """`tl.reduce` and all that is made of it."""

    def apply_impl(self, input: tuple[tl.tensor, ...]) -> Any:
        if self.combine_fn == tl.standard._elementwise_max:
            return self.extreme(input[0], np.fmax)
        if self.combine_fn == tl.standard._elementwise_min:
            return self.extreme(input[0], np.fmin)
        return super().apply_impl(input)

    def extreme(self, x: tl.tensor, pick: np.ufunc) -> tl.tensor:
        axis = self.axis if self.axis is not None else tuple(range(x.handle.data.ndim))
        return self.to_tensor(
            pick.reduce(x.handle.data, axis=axis, keepdims=self.keep_dims), x.dtype
        )

    def generic_reduce(self, input: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        tiles = [x.handle.data for x in input]
        kept = np.sum(tiles[0], axis=self.axis, keepdims=self.keep_dims).shape
        if self.axis is None:
            tiles = [x.reshape(-1) for x in tiles]
        tiles = [np.moveaxis(x, self.axis or 0, 0) for x in tiles]
        while tiles[0].shape[0] > 1:  # neighbours first, so that the order is kept
            tiles = self.combine(input, [x[0::2] for x in tiles], [x[1::2] for x in tiles])
        tiles = [x[0].reshape(kept) for x in tiles]
        return [self.to_tensor(x, like.dtype) for x, like in zip(tiles, input, strict=True)]


class Scan(Tiles, interpreter.ScanOps):
    """`tl.associative_scan` and all that is made of it."""

    def generic_scan(self, input: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        tiles = [x.handle.data for x in input]
        size = tiles[0].shape[self.axis]
        place = np.arange(size).reshape([-1 if i == self.axis else 1 for i in range(tiles[0].ndim)])
        step = 1
        while step < size:
            before = [np.roll(x, step, self.axis) for x in tiles]
            both = self.combine(input, before, tiles)
            tiles = [np.where(place < step, x, y) for x, y in zip(tiles, both, strict=True)]
            step *= 2
        return [self.to_tensor(x, like.dtype) for x, like in zip(tiles, input, strict=True)]
