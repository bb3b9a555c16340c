"""Puts packed weights in the places of parameters, as soon as all their values have come."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezel.kernels.cpu.packing import pack_rows
from bezel.kernels.cpu.weight_memory import WeightMemory
from bezel.kernels.packed import (
    COLUMNS,
    GROUP,
    Int4Values,
    PackedWeight,
    WeightFormat,
    packed_shape,
    quantize_int4,
)

_VALUES_AT_ONCE = 1 << 19  # of which a processor's cache holds the float32 values


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A tensor of a file: `read` gives some rows of its first dimension."""

    shape: torch.Size
    read: Callable[[slice], Tensor | Int4Values]


Values = Tensor | Int4Values | StoredRows


def with_whole_experts(formats: Mapping[str, WeightFormat]) -> dict[str, WeightFormat]:
    """`formats` without experts of which only one of the two matrices is to be packed: their
    products are one operation."""
    others = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}

    def is_whole(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return not module.endswith(".experts") or f"{module}.{others[leaf]}" in formats

    return {name: format for name, format in formats.items() if is_whole(name)}


class Packer:
    """`formats` names the parameters of `model`, on the meta device, that are to be packed."""

    def __init__(self, model: nn.Module, formats: Mapping[str, WeightFormat]) -> None:
        self.formats = formats
        self._model = model
        self._shapes = {name: value.shape for name, value in model.named_parameters()}
        self._unfinished: dict[str, PackedWeight] = {}
        self._memory = WeightMemory()

    def shape(self, name: str, rows: slice) -> torch.Size:
        """Of these rows of a parameter."""
        first, *rest = self._shapes[name]
        return torch.Size([len(range(*rows.indices(first))), *rest])

    def add(self, name: str, rows: slice, values: Values, is_last: bool) -> None:
        """Rows of a parameter, which takes its place once its last ones are here."""
        if name not in self._unfinished:
            self._unfinished[name] = self._new(name)
        weight = self._unfinished[name]
        for first, piece in _pieces(values):
            _pack(piece, weight, (rows.start or 0) + first)
        if not is_last:
            return
        _fill_up(weight)
        del self._unfinished[name]
        module_name, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(module_name)
        delattr(module, leaf)
        setattr(module, leaf, weight)

    def _new(self, name: str) -> PackedWeight:
        *stack, num_outputs, num_inputs = self._shapes[name]
        format = self.formats[name]
        shape = packed_shape(num_outputs, num_inputs, format)
        data = self._memory.empty(*stack, *shape)
        return PackedWeight(data, format, num_outputs, num_inputs)


def _pieces(values: Values) -> Iterator[tuple[int, Tensor | Int4Values]]:
    """Some rows after the other, each with the number of its first one: what a value is turned into
    on its way stays in the processor's cache, and a table is never there as a whole."""
    num_rows, *rest = values.shape
    step = 1
    if len(rest) == 1:
        step = max(1, _VALUES_AT_ONCE // rest[0] // COLUMNS) * COLUMNS
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        yield first, values.read(rows) if isinstance(values, StoredRows) else values[rows]


def _pack(values: Tensor | Int4Values, weight: PackedWeight, first: int) -> None:
    if len(values.shape) == 3:  # matrices of a stack
        for i in range(values.shape[0]):
            _pack(values[i], weight[first + i], 0)
        return
    if weight.format is WeightFormat.INT4:
        if isinstance(values, Tensor):
            values = Int4Values(*quantize_int4(values))
    elif isinstance(values, Int4Values):
        values = values.values()
    elif values.dtype not in (torch.float32, torch.bfloat16):
        values = values.float()
    pack_rows(values, weight, first)


def _fill_up(weight: PackedWeight) -> None:
    """Zeros in the rows by which the last block is larger than the matrix."""
    missing = -weight.num_outputs % COLUMNS
    if missing == 0:
        return
    zeros: Tensor | Int4Values = torch.zeros(missing, weight.num_inputs)
    if weight.format is WeightFormat.INT4:
        none = torch.zeros(missing, weight.num_inputs // GROUP)
        codes = torch.zeros(missing, weight.num_inputs, dtype=torch.uint8)
        zeros = Int4Values(codes, none, none)
    is_stack = weight.data.ndim == 3
    for matrix in [weight[i] for i in range(len(weight.data))] if is_stack else [weight]:
        pack_rows(zeros, matrix, weight.num_outputs)
