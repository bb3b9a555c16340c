"""Puts packed weights in the places of parameters, as soon as all their values have come."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bezel.kernels.cpu.weight_memory import WeightMemory
from bezel.kernels.packed import Int4Values, PackedWeight, WeightFormat, pack_weight, stack_packed

Values = Tensor | Int4Values


def bfloat16_matrices(model: nn.Module) -> dict[str, WeightFormat]:
    """Every matrix that the kernels for CPUs can take as it is."""
    format = WeightFormat.BFLOAT16
    return {
        name: format
        for name, value in model.named_parameters()
        if value.ndim > 1 and value.shape[-1] % format.granularity == 0
    }


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
        self._parts: dict[str, dict[int, Values]] = {}
        self._memory = WeightMemory()

    def shape(self, name: str, rows: slice) -> torch.Size:
        """Of these rows of a parameter."""
        first, *rest = self._shapes[name]
        return torch.Size([len(range(*rows.indices(first))), *rest])

    def add(self, name: str, rows: slice, values: Values, is_last: bool) -> None:
        """Rows of a parameter, which is packed once its last ones are here."""
        parts = self._parts.setdefault(name, {})
        parts[rows.start or 0] = values
        if not is_last:
            return
        packed = _pack(_joined([parts[start] for start in sorted(parts)]), self.formats[name])
        del self._parts[name]
        packed = self._memory.keep(packed)
        module_name, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(module_name)
        delattr(module, leaf)
        setattr(module, leaf, packed)


def _joined(parts: list[Values]) -> Values:
    """Row on row; in float32, if not all of them come in four bits."""
    if len(parts) == 1:
        return parts[0]
    in_four_bits = [part for part in parts if isinstance(part, Int4Values)]
    if len(in_four_bits) == len(parts):
        return Int4Values(
            torch.cat([part.codes for part in in_four_bits]),
            torch.cat([part.scale for part in in_four_bits]),
            torch.cat([part.minimum for part in in_four_bits]),
        )
    return torch.cat([part.values() if isinstance(part, Int4Values) else part for part in parts])


def _pack(values: Values, format: WeightFormat) -> PackedWeight:
    if len(values.shape) == 2:
        return pack_weight(values, format)
    return stack_packed(pack_weight(values[i], format) for i in range(values.shape[0]))
