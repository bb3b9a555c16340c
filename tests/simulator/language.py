"""Triton's language as a compiler takes it, where the stock interpreter is more lenient.

Loop variables are tensors, as they are when compiled: their arithmetic overflows, and they can be
cast. What `tl.multiple_of` and its like promise is checked, since a compiler relies on it.
"""

import ast
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from simulator.errors import KernelBug
from triton.runtime import interpreter

core = tl.core  # `_patch_lang` patches the modules that a function sees: here `tl` and `core`

RANGE = "_simulated_range"


def install() -> None:
    """Patch `triton.language` once and for all; the stock interpreter does it at every call."""
    interpreter._patch_lang(install)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    interpreter.FunctionRewriter.ast_transformer = LoopsOverTensors()
    interpreter.FunctionRewriter._compile_and_exec = _compile
    for language in (tl, core):
        language.range = loop
        language.multiple_of = _promise("tl.multiple_of", _is_multiple)
        language.max_contiguous = _promise("tl.max_contiguous", _is_contiguous)
        language.max_constancy = _promise("tl.max_constancy", _is_constant)


class LoopsOverTensors(interpreter.ASTTransformer):
    """Has `range` in kernels make tensors."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "range":
            node.func.id = RANGE
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        self.generic_visit(node)
        return super().visit_Assign(node)


def _compile(self: interpreter.FunctionRewriter, tree: ast.Module) -> Callable[..., Any]:
    """The rewritten function; unlike the stock one it leaves its module's names alone."""
    names = self.fn.__globals__
    names["interpreter_semantic"] = interpreter.interpreter_semantic
    names[RANGE] = loop
    local_names: dict[str, Any] = {}
    exec(compile(tree, self.filename, "exec"), names, local_names)
    return local_names[self.fn.__name__]


def loop(first: Any, end: Any = None, step: Any = 1, **options: Any) -> Iterator[tl.tensor]:
    """`range` and `tl.range` of a kernel."""
    if end is None:
        first, end = 0, first
    bounds = [x.dtype for x in (first, end, step) if isinstance(x, tl.tensor)]
    dtype = tl.int64 if tl.int64 in bounds else tl.int32
    for i in range(int(first), int(end), int(step)):
        yield interpreter.interpreter_semantic.scalar_constant(i, dtype)


def _promise(name: str, is_kept: Callable[[np.ndarray, int, int, int], bool]) -> Callable[..., Any]:
    def promise(input: Any, values: Any) -> Any:
        if not isinstance(input, tl.tensor):
            return input
        data = input.handle.data
        unit = 1
        if input.dtype.is_ptr():
            data, unit = data.view(np.int64), input.dtype.element_ty.primitive_bitwidth // 8
        values = values if isinstance(values, list | tuple) else [values]
        if len(values) != max(1, len(input.shape)):
            raise KernelBug(f"{name} needs a value for each dimension of {input.shape}")
        for axis, value in enumerate(values):
            if not is_kept(data, axis, int(value), unit):
                raise KernelBug(f"{name}({int(value)}) does not hold along dimension {axis}")
        return input

    return promise


def _is_multiple(data: np.ndarray, axis: int, value: int, unit: int) -> bool:
    """Whether every run of consecutive numbers begins at a multiple: that is what Triton means."""
    continues = np.diff(data, axis=axis) == unit
    first = np.ones_like(np.take(data, [0], axis), dtype=bool)
    begins = np.concatenate([first, ~continues], axis=axis)
    return not (data[begins] % value).any()


def _is_contiguous(data: np.ndarray, axis: int, value: int, unit: int) -> bool:
    return bool((_groups(np.diff(data, axis=axis), axis, value) == unit).all())


def _is_constant(data: np.ndarray, axis: int, value: int, unit: int) -> bool:
    return not _groups(np.diff(data, axis=axis), axis, value).any()


def _groups(steps: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The steps that stay within groups of `size` numbers."""
    inside = np.arange(steps.shape[axis]) % size != size - 1
    return np.compress(inside, steps, axis)
