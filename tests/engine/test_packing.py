"""Packed weights take the places of parameters once all their parts are there."""

import pytest
import torch

from bezel.engine.layers.mlp import GatedMLP
from bezel.engine.packing import Packer, with_whole_experts
from bezel.kernels.packed import (
    Int4Values,
    PackedWeight,
    WeightFormat,
    quantize_int4,
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
