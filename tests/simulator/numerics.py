"""Arithmetic as a GPU does it, where the stock interpreter has it wrong.

numpy has neither bfloat16 nor fp8, so the interpreter keeps their bits in unsigned integers, and
the stock one computes on those. Here they are cast exactly (to nearest even; fp8 saturates),
multiplied exactly in `tl.dot`, and refused everywhere else: a kernel computes in float32.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from simulator.errors import KernelBug
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# Formats that numpy lacks, by Triton's name.
SMALL_FLOATS = {
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_FP8_MAX = {"fp8e4nv": 448.0, "fp8e5": 57344.0}
_COMPARISONS = frozenset(
    (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
)
_SELECTIONS = frozenset((np.minimum, np.maximum, np.fmin, np.fmax))


def as_torch(data: np.ndarray) -> torch.Tensor:
    """The same numbers for torch, which wants arrays that are dense and writable."""
    if not (data.flags.c_contiguous and data.flags.writeable):
        data = data.copy()
    return torch.from_numpy(data)


def to_float32(handle: TensorHandle) -> np.ndarray:
    """A handle's numbers, whatever their format, in float32."""
    small = SMALL_FLOATS.get(handle.dtype.scalar.name)
    if small is None:
        return handle.data.astype(np.float32, copy=False)
    return as_torch(handle.data).view(small).float().numpy()


def from_float32(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Numbers in the format `dtype`, rounded to nearest even."""
    small = SMALL_FLOATS.get(dtype.name)
    if small is None:
        return data.astype(numpy_dtype(dtype), copy=False)
    x = as_torch(data.astype(np.float32, copy=False))
    if dtype.name in _FP8_MAX:
        x = x.clamp(-_FP8_MAX[dtype.name], _FP8_MAX[dtype.name])
        return x.to(small).view(torch.uint8).numpy()
    return x.to(small).view(torch.uint16).numpy()


_stock_numpy_dtype = interpreter._get_np_dtype  # builds its table anew on every call
_numpy_dtypes: dict[str, np.dtype] = {}


def numpy_dtype(dtype: tl.dtype) -> np.dtype:
    """How the interpreter stores numbers of a type."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    if scalar.name not in _numpy_dtypes:
        _numpy_dtypes[scalar.name] = _stock_numpy_dtype(scalar)
    return _numpy_dtypes[scalar.name]


def _tf32(data: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32: its upper 19 bits."""
    bits = np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


class Numerics(InterpreterBuilder):
    """Triton's interpreter with the arithmetic put right."""

    def __init__(self) -> None:
        super().__init__()
        self.codegen_fns["min_dot_size"] = self._min_dot_size

    def get_bf16(self, value: float) -> TensorHandle:
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    @staticmethod
    def _min_dot_size(lhs: tl.dtype, rhs: tl.dtype) -> tuple[int, int, int]:
        return (1, 1, 32 if lhs.scalar.primitive_bitwidth == 8 else 16)

    @staticmethod
    def _refuse_small(name: str, *operands: TensorHandle) -> None:
        for operand in operands:
            if operand.dtype.scalar.name in SMALL_FLOATS:
                raise KernelBug(f"{name} of {operand.dtype.scalar}: cast to float32 first")

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        dtype = dst_type.scalar
        if src.dtype.scalar.name in SMALL_FLOATS or dtype.name in SMALL_FLOATS:
            return TensorHandle(from_float32(to_float32(src), dtype), dtype)
        return TensorHandle(src.data.astype(numpy_dtype(dtype)), dtype)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding: Any) -> TensorHandle:
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: np.ufunc) -> TensorHandle:
        dtype = lhs.dtype.scalar
        if op in _COMPARISONS:
            if dtype.name in SMALL_FLOATS:
                return TensorHandle(op(to_float32(lhs), to_float32(rhs)), tl.int1)
            return TensorHandle(op(lhs.data, rhs.data), tl.int1)
        if dtype.name in SMALL_FLOATS:
            if op not in _SELECTIONS:
                raise KernelBug(f"{op.__name__} of {dtype}: cast to float32 first")
            return TensorHandle(from_float32(op(to_float32(lhs), to_float32(rhs)), dtype), dtype)
        return TensorHandle(op(lhs.data, rhs.data).astype(numpy_dtype(dtype), copy=False), dtype)

    # tl.minimum and tl.maximum pass over NaN unless told otherwise.
    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def unary_op(self, arg: TensorHandle, op: np.ufunc) -> TensorHandle:
        self._refuse_small(op.__name__, arg)
        return super().unary_op(arg, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        self._refuse_small("fma", x, y, z)
        return super().create_fma(x, y, z)

    def create_clampf(
        self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, propagate_nans: Any
    ) -> TensorHandle:
        self._refuse_small("clamp", arg, lo, hi)
        return super().create_clampf(arg, lo, hi, propagate_nans)

    def create_histogram(
        self, data: TensorHandle, bins: int, mask: TensorHandle | None
    ) -> TensorHandle:
        counted = (data.data >= 0) & (data.data < bins)
        if mask is not None:
            counted &= mask.data
        counts = np.bincount(data.data[counted], minlength=bins)
        return TensorHandle(counts.astype(np.int32), tl.int32)

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, *rest: Any
    ) -> TensorHandle:
        dtype = a.dtype.scalar
        if dtype.is_int():
            product = np.matmul(a.data.astype(np.int32), b.data.astype(np.int32))
            return TensorHandle(product + d.data, d.dtype.scalar)
        if dtype.name == "fp64":
            x, y = a.data, b.data
        else:
            x, y = to_float32(a), to_float32(b)
            if dtype.name == "fp32" and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
                x, y = _tf32(x), _tf32(y)
        total = torch.matmul(as_torch(x), as_torch(y)).numpy() + d.data
        return TensorHandle(total.astype(d.data.dtype, copy=False), d.dtype.scalar)
