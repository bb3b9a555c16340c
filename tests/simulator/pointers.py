"""Every pointer knows which tensor it was made from, wherever arithmetic takes it."""

from typing import Any

import numpy as np
import triton.language as tl
from simulator.errors import KernelBug
from simulator.numerics import Numerics
from triton.runtime.interpreter import TensorHandle

VIEW = "view"  # the attribute of a handle that holds a `memory.View`


def _carry(source: TensorHandle, result: TensorHandle) -> TensorHandle:
    view = source.attr.get(VIEW)
    if view is not None:
        result.attr[VIEW] = view
    return result


class Pointers(Numerics):
    """Carries a pointer's tensor through whatever changes a pointer."""

    def create_addptr(self, ptr: TensorHandle, offset: TensorHandle) -> TensorHandle:
        width = np.uint64(max(1, ptr.get_element_ty().primitive_bitwidth // 8))
        data = ptr.data + offset.data.astype(np.uint64) * width
        return _carry(ptr, TensorHandle(data, ptr.dtype))

    def create_splat(self, ret_ty: tl.block_type, arg: TensorHandle) -> TensorHandle:
        # The same number at every index; the first arithmetic makes it dense.
        shape = ret_ty.shape.values
        data = np.ndarray(shape, arg.data.dtype, buffer=arg.data, strides=(0,) * len(shape))
        return _carry(arg, TensorHandle(data, arg.dtype.scalar))

    def create_unsplat(self, arg: TensorHandle) -> TensorHandle:
        return _carry(arg, super().create_unsplat(arg))

    def create_expand_dims(self, arg: TensorHandle, axis: int) -> TensorHandle:
        return _carry(arg, super().create_expand_dims(arg, axis))

    def create_broadcast(self, arg: TensorHandle, shape: Any) -> TensorHandle:
        return _carry(arg, super().create_broadcast(arg, shape))

    def create_reshape(self, arg: TensorHandle, shape: Any, allow_reorder: bool) -> TensorHandle:
        return _carry(arg, super().create_reshape(arg, shape, allow_reorder))

    def create_trans(self, arg: TensorHandle, perm: Any) -> TensorHandle:
        return _carry(arg, super().create_trans(arg, perm))

    def create_bitcast(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        return _carry(src, super().create_bitcast(src, dst_type))

    def create_select(
        self, cond: TensorHandle, lhs: TensorHandle, rhs: TensorHandle
    ) -> TensorHandle:
        data = np.where(cond.data, lhs.data, rhs.data)
        if lhs.attr.get(VIEW) is not rhs.attr.get(VIEW):
            raise KernelBug("tl.where between pointers to different tensors")
        return _carry(lhs, TensorHandle(data, rhs.dtype.scalar))

    create_int_to_ptr = create_bitcast
    create_ptr_to_int = create_bitcast
