"""Running the programs of one launch: in shuffled order, and with the errors they raise."""

import dataclasses
import inspect
import itertools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from simulator import frontend, language, reductions
from simulator.builder import Simulator
from simulator.errors import KernelBug
from simulator.frontend import Frontend
from simulator.pointers import VIEW
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_MAX_GRID = (2**31 - 1, 65535, 65535)
_OPTIONS = {f.name for kind in (CUDAOptions, HIPOptions) for f in dataclasses.fields(kind)}


def install(builder: Simulator) -> None:
    """Have every kernel of this process interpreted by `builder`."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
    # The stock default computes every integer operation three times over, to no effect.
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic = Frontend(builder)
    language.install()
    frontend.install()
    reductions.install()
    interpreter.GridExecutor.__call__ = _run_grid
    interpreter.InterpretedFunction.__call__ = _call_function


def _call_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


def _run_grid(self: Any, *args: Any, **kwargs: Any) -> None:
    builder = interpreter.interpreter_builder
    signature = inspect.signature(self.fn)
    unknown = set(kwargs) - set(signature.parameters) - _OPTIONS
    if unknown:
        raise KernelBug(f"{self.fn.__name__} is launched with unknown arguments {sorted(unknown)}")
    kwargs = {name: value for name, value in kwargs.items() if name in signature.parameters}
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    grid = self.grid(bound.arguments) if callable(self.grid) else self.grid
    grid = tuple(int(size) for size in grid) + (1,) * (3 - len(grid))
    if any(size > most for size, most in zip(grid, _MAX_GRID, strict=True)):
        raise KernelBug(f"{self.fn.__name__}: no GPU takes a grid of {grid}")
    values = {
        name: value if name in self.constexprs else _argument(builder, name, value)
        for name, value in bound.arguments.items()
    }
    programs = list(itertools.product(*map(range, grid)))
    if builder.watch is not None:
        programs = builder.watch.on_launch(self.fn.__name__, grid, programs)
    builder.set_grid_dim(*grid)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiles are too small to share out
    try:
        with np.errstate(all="ignore"), _disable_current_modes():
            for program in programs:
                if builder.watch is not None:
                    builder.watch.clock.start_program()
                builder.set_grid_idx(*program)
                self.fn(**values)
    except Exception as error:
        error.add_note(f"in program {builder.grid_idx} of {self.fn.__name__}{list(grid)}")
        raise
    finally:
        torch.set_num_threads(threads)


def _argument(builder: Simulator, name: str, value: Any) -> Any:
    """A launch argument as the kernel sees it; its name is the tensor's, if it has none yet."""
    if isinstance(value, tuple):
        return interpreter._tuple_create(value, [_argument(builder, name, x) for x in value])
    if isinstance(value, bool):
        return tl.tensor(TensorHandle(np.array([value]), tl.int1), tl.int1)
    if isinstance(value, float):
        return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    argument = interpreter._implicit_cvt(value)
    if isinstance(value, torch.Tensor) and builder.watch is not None:
        argument.handle.attr[VIEW] = builder.watch.view(value, name.removesuffix("_ptr"))
    return argument
