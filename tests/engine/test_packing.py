"""Packed weights take the places of parameters once all their parts are there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bezel.engine import packing
from bezel.engine.layers.mlp import GatedMLP
from bezel.engine.packing import Packer, StoredRows, with_whole_experts
from bezel.kernels.packed import (
    Int4Values,
    PackedWeight,
    WeightFormat,
    pack_weight,
    quantize_int4,
    stack_packed,
    unpack_weight,
)

INT4, INT8 = WeightFormat.INT4, WeightFormat.INT8


def test_experts_are_packed_whole_or_not_at_all() -> None:
    formats = {
        "layers.0.experts.gate_up_proj": INT8,
        "layers.1.experts.gate_up_proj": INT8,
        "layers.1.experts.down_proj": INT4,
        "layers.0.mlp.down_proj.weight": INT4,
    }
    assert with_whole_experts(formats) == {
        name: format for name, format in formats.items() if name != "layers.0.experts.gate_up_proj"
    }


@pytest.mark.parametrize("format", [INT4, INT8])
def test_parts_are_joined_in_the_order_of_their_rows(format: WeightFormat) -> None:
    mlp = GatedMLP(64, 64, torch.bfloat16)
    packer = Packer(mlp, {"gate_up_proj.weight": format})
    up, gate = (Int4Values(*quantize_int4(torch.randn(64, 64))) for _ in range(2))
    packer.add("gate_up_proj.weight", slice(64, 128), up, is_last=False)
    assert isinstance(mlp.gate_up_proj.weight, torch.Tensor)
    packer.add("gate_up_proj.weight", slice(0, 64), gate, is_last=True)
    packed = mlp.gate_up_proj.weight
    assert isinstance(packed, PackedWeight) and packed.format is format
    expected = torch.cat([gate.values(), up.values()])
    most = 0 if format is INT4 else expected.abs().max() / 250
    assert (unpack_weight(packed) - expected).abs().max() <= most


def test_a_part_that_is_not_in_four_bits_makes_all_of_them_floats() -> None:
    mlp = GatedMLP(64, 64, torch.bfloat16)
    packer = Packer(mlp, {"gate_up_proj.weight": INT8})
    gate, up = Int4Values(*quantize_int4(torch.randn(64, 64))), torch.randn(64, 64)
    packer.add("gate_up_proj.weight", slice(0, 64), gate, is_last=False)
    packer.add("gate_up_proj.weight", slice(64, 128), up, is_last=True)
    packed = mlp.gate_up_proj.weight
    assert isinstance(packed, PackedWeight)
    expected = torch.cat([gate.values(), up])
    assert (unpack_weight(packed) - expected).abs().max() <= expected.abs().max() / 250


class Matrix(nn.Module):
    """One parameter, on the meta device."""

    weight: PackedWeight

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.empty(*shape, device="meta")))


def packed_of(values: "Tensor | StoredRows", format: WeightFormat) -> PackedWeight:
    matrix = Matrix(*values.shape)
    Packer(matrix, {"weight": format}).add("weight", slice(None), values, is_last=True)
    return matrix.weight


@pytest.mark.parametrize("format", WeightFormat)
@pytest.mark.parametrize("shape", [(200, 64), (3, 100, 64)])
def test_a_weight_is_packed_bit_for_bit_as_a_whole_one(
    shape: tuple[int, ...], format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_VALUES_AT_ONCE", 64 * 64)
    values = torch.randn(shape)
    matrices = values if len(shape) == 3 else values[None]
    expected = stack_packed(pack_weight(matrix, format) for matrix in matrices)
    packed = packed_of(values, format)
    assert torch.equal(packed.data.view(expected.data.shape), expected.data)
    assert (packed.num_outputs, packed.num_inputs) == shape[-2:]


@pytest.mark.parametrize(
    ("format", "as_stored"),
    [(INT8, lambda x: x), (INT4, lambda x: Int4Values(*quantize_int4(x)))],
    ids=["int8", "int4"],
)
def test_rows_of_a_file_are_read_some_at_a_time(
    format: WeightFormat,
    as_stored: Callable[[Tensor], Tensor | Int4Values],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "_VALUES_AT_ONCE", 130 * 32)  # two blocks, and not all of a third
    values = torch.randn(300, 32)
    asked = []

    def read(rows: slice) -> Tensor | Int4Values:
        asked.append((rows.start, rows.stop))
        return as_stored(values[rows])

    packed = packed_of(StoredRows(values.shape, read), format)
    assert asked == [(0, 128), (128, 256), (256, 300)]
    assert torch.equal(packed.data, pack_weight(as_stored(values), format).data)


def test_halves_are_packed_as_the_floats_they_are() -> None:
    values = torch.randn(64, 64).half()
    assert torch.equal(packed_of(values, INT8).data, pack_weight(values.float(), INT8).data)
