"""Rows packed in pieces against matrices packed as a whole, bit for bit."""

import pytest
import torch
from torch import Tensor

from bezel.kernels.cpu import packing
from bezel.kernels.cpu.packing import pack_rows
from bezel.kernels.packed import (
    Int4Values,
    PackedWeight,
    WeightFormat,
    pack_weight,
    packed_shape,
    quantize_int4,
)

ROWS = 192
CUTS = [(0, 3), (3, 64), (64, 101), (101, 192)]  # within blocks, at their ends, across them


def weight_of(num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_inputs)
    weight = torch.randn(ROWS, num_inputs, generator=generator)
    weight[5] = 0
    weight[70] *= 1e-30
    return weight


def nothing(num_inputs: int, format: WeightFormat) -> PackedWeight:
    shape = packed_shape(ROWS, num_inputs, format)
    return PackedWeight(torch.full(shape, 77, dtype=torch.uint8), format, ROWS, num_inputs)


@pytest.fixture(autouse=True)
def many_threads(monkeypatch: pytest.MonkeyPatch, three_threads: None) -> None:
    monkeypatch.setattr(packing, "_MANY_VALUES", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [WeightFormat.INT8, WeightFormat.BFLOAT16])
@pytest.mark.parametrize("num_inputs", [32, 96, 640])
def test_values(num_inputs: int, format: WeightFormat, dtype: torch.dtype) -> None:
    weight = weight_of(num_inputs).to(dtype)
    packed = nothing(num_inputs, format)
    for first, end in CUTS:
        pack_rows(weight[first:end], packed, first)
    assert torch.equal(packed.data, pack_weight(weight, format).data)


@pytest.mark.parametrize("num_inputs", [32, 96, 640])
def test_four_bits(num_inputs: int) -> None:
    values = Int4Values(*quantize_int4(weight_of(num_inputs)))
    packed = nothing(num_inputs, WeightFormat.INT4)
    for first, end in CUTS:
        pack_rows(values[first:end], packed, first)
    assert torch.equal(packed.data, pack_weight(values, WeightFormat.INT4).data)


def test_columns_of_a_larger_matrix() -> None:
    weight = weight_of(640)
    packed = nothing(320, WeightFormat.INT8)
    pack_rows(weight[:, 320:], packed, 0)
    assert torch.equal(packed.data, pack_weight(weight[:, 320:], WeightFormat.INT8).data)
