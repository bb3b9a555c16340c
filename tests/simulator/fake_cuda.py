"""GPU tensors without a GPU: shapes, dtypes and devices are checked, nothing is computed.

On top of torch's FakeTensorMode, in which

- an operation that mixes host and device tensors raises,
- reading a device value on the host raises (`.item()`, `.tolist()`, `bool(x)`), and so does any
  operation whose result's shape depends on values (`nonzero`, `unique`, masks as indices).

A torch built for CPUs refuses to index, move or pin tensors that say they are on a GPU, in the
Python bindings; those calls are passed to the operators underneath.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.runtime.interpreter import InterpretedFunction

from bezel.kernels.jit import triton_on_cpu


class Launch:
    """A kernel launch that did not take place."""

    def __init__(self, name: str, grid: tuple[int, ...], tensors: list[Tensor]) -> None:
        self.name, self.grid, self.tensors = name, grid, tensors


@contextmanager
def fake_cuda(architecture: str = "sm_90") -> Iterator[list[Launch]]:
    """Make device="cuda" work for everything but results; yields the kernels launched so far."""
    launches: list[Launch] = []

    def launcher(kernel: InterpretedFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert all(isinstance(n, int) for n in grid), "a grid must be known on the host"
            tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
            launches.append(Launch(kernel.__name__, grid, tensors))

        return launch

    with (
        pytest.MonkeyPatch.context() as patch,
        triton_on_cpu(architecture),
        FakeTensorMode(),
        _Bindings(),
    ):
        patch.setattr(InterpretedFunction, "__getitem__", launcher)
        yield launches


class _Bindings(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            return _view(*args)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.to and isinstance(args[1], (str, torch.device)):
            return torch.ops.aten._to_copy.default(args[0], device=torch.device(args[1]))
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(args[0], args[1])
        return func(*args, **kwargs)


def _view(x: Tensor, index: Any) -> Tensor:
    """x[index] for indices of ints, slices, None, a leading Ellipsis and integer tensors."""
    index = index if isinstance(index, tuple) else (index,)
    dim = 0
    for part in index:
        if part is None:
            x = x.unsqueeze(dim)
            dim += 1
        elif part is Ellipsis:
            dim = x.dim() - (len(index) - 1)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
            dim += 1
        elif isinstance(part, int):
            x = x.select(dim, part)
        else:
            x = torch.ops.aten.index.Tensor(x, [None] * dim + [part])
            dim += 1
    return x
