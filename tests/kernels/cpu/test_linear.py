"""Products with packed weights, and rows of packed tables, against the same in plain torch."""

import pytest
import torch

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.linear import linear, packed_embedding, quantize_activations
from bezel.kernels.packed import (
    Int4Values,
    WeightFormat,
    pack_weight,
    packed_bytes,
    quantize_int4,
    unpack_weight,
)

FORMATS = list(WeightFormat)
# Of the first and the last one block isn't full; of the last a thread takes two at a time, and one
# is left.
SHAPES = [(100, 64), (640, 2048), (1536, 640), (2200, 64)]
STEPS = {WeightFormat.BFLOAT16: 2**-8, WeightFormat.INT8: 1 / 254, WeightFormat.INT4: 1 / 30}


def weight_of(num_outputs: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_outputs, num_inputs, generator=generator)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_weights_stand_for_what_was_packed(
    format: WeightFormat, shape: tuple[int, int]
) -> None:
    weight = weight_of(*shape)
    packed = pack_weight(weight, format)
    assert packed.num_bytes == packed_bytes(*shape, format)
    largest = weight.abs().max()
    # Half a step of the coarsest scale there is: INT4 spreads its steps over both signs.
    most = largest * STEPS[format] * (2 if format is WeightFormat.INT4 else 1)
    assert (unpack_weight(packed) - weight).abs().max() <= most * 1.01


def test_values_in_four_bits_stay_exact() -> None:
    codes, scale, minimum = quantize_int4(weight_of(70, 96))
    values = Int4Values(codes, scale, minimum)
    assert torch.equal(unpack_weight(pack_weight(values, WeightFormat.INT4)), values.values())
    as_int8 = unpack_weight(pack_weight(values, WeightFormat.INT8))
    assert (as_int8 - values.values()).abs().max() < values.values().abs().max() / 250


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_zeros_stays_zero(format: WeightFormat) -> None:
    weight = weight_of(64, 64)
    weight[5] = 0
    packed = pack_weight(weight, format)
    assert not unpack_weight(packed)[5].any()
    y = linear(torch.zeros(3, 64), packed)
    assert torch.equal(y, torch.zeros(3, 64))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 6, 13, 40, 200])
def test_products_are_those_of_the_reference(
    format: WeightFormat, dtype: torch.dtype, shape: tuple[int, int], num_rows: int
) -> None:
    packed = pack_weight(weight_of(*shape), format)
    x = weight_of(num_rows, shape[1], seed=1).to(dtype)
    with plain_torch():
        expected = linear(x, packed, torch.float32)
    y = linear(x, packed, torch.float32)
    assert y.shape == (num_rows, shape[0])
    # Codes may round the other way where a value lies between two of them.
    slack = 3e-6 if format is WeightFormat.BFLOAT16 else 2e-4
    assert (y - expected).abs().max() <= slack * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_the_others(format: WeightFormat, dtype: torch.dtype) -> None:
    packed = pack_weight(weight_of(640, 640), format)
    x = weight_of(50, 640, seed=1).to(dtype)
    together = linear(x, packed)
    for rows in (slice(0, 1), slice(7, 9), slice(20, 33)):
        assert torch.equal(linear(x[rows], packed), together[rows])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_tables_are_those_of_the_reference(
    format: WeightFormat, dtype: torch.dtype
) -> None:
    packed = pack_weight(weight_of(130, 96), format)
    token_ids = torch.tensor([0, 129, 63, 64, 5, 5])
    with plain_torch():
        expected = packed_embedding(token_ids, packed, 2.5, dtype)
    assert torch.equal(packed_embedding(token_ids, packed, 2.5, dtype), expected)


@pytest.mark.parametrize("format", [WeightFormat.INT8, WeightFormat.INT4])
def test_activations_are_rounded_in_groups(format: WeightFormat) -> None:
    x = torch.ones(1, 64)
    x[0, 0] = 1270.0
    rounded = quantize_activations(x, format)
    assert rounded[0, 1] == 0  # a tenth of a step
    assert rounded[0, 33] == pytest.approx(1.0)
