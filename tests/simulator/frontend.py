"""Triton's frontend without its detours: it takes most of an interpreted kernel's time.

Nothing here changes a result. The frontend describes the type and shape of every value anew, though
a kernel has a few dozen of them; and types are what "IR" types are to the interpreter.
"""

import math
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic

_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_init_block_type = tl.block_type.__init__


class Frontend(TritonSemantic):
    """The meaning of Triton's operations, with the common cases first."""

    def broadcast_impl_value(self, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block():
            if left.shape.values == right.shape.values:
                return lhs, rhs
            return super().broadcast_impl_value(lhs, rhs)
        if left.is_block():
            return lhs, self._spread(rhs, left)
        if right.is_block():
            return self._spread(lhs, right), rhs
        return lhs, rhs

    def _spread(self, scalar: tl.tensor, block: tl.block_type) -> tl.tensor:
        kind = block.with_element_ty(scalar.dtype)
        return tl.tensor(self.builder.create_splat(kind, scalar.handle), kind)

    def cast(self, input: tl.tensor, dst_ty: tl.dtype, *rounding: Any) -> tl.tensor:
        if input.dtype is dst_ty:
            return input
        return super().cast(input, dst_ty, *rounding)


def install() -> None:
    """Have Triton describe each type once."""
    tl.block_type.__init__ = _describe_block
    tl.tensor.__init__ = _describe_tensor
    for kind in (tl.dtype, tl.block_type, tl.pointer_type):
        kind.to_ir = lambda self, builder: self


def _describe_block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = [size.value if isinstance(size, tl.constexpr) else size for size in shape]
    key = (element_ty.name, *sizes)
    try:
        known = _block_types.get(key)
    except TypeError:  # a size is a tensor, and the next line says so
        known = None
    if known is None:
        _init_block_type(self, element_ty, shape)
        self.tensor_shape = tl.tuple([tl.constexpr(size) for size in sizes])
        self.tensor_numel = tl.constexpr(math.prod(sizes))
        known = _block_types[key] = self.__dict__
    self.__dict__ = dict(known)


def _describe_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if type.is_block():
        self.shape, self.numel = type.tensor_shape, type.tensor_numel
    else:
        self.shape, self.numel = _NO_SHAPE, _ONE


_NO_SHAPE, _ONE = tl.tuple([]), tl.constexpr(1)
