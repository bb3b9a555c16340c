"""Weights as the CPU's matrix kernels read them.

    BFLOAT16   as they are                                                           2 bytes a value
    INT8       w ≈ scale[n] · code, −127 … 127                                       1 byte
    INT4       w ≈ scale[n, g] · code − minimum[n, g], 0 … 15, groups of 32 k        5 bits

64 rows of w form a block, and the same four bytes of all 64 stand together, which is what the
kernel in `cpu/gemm.py` reads at a time.

N outputs   K inputs   B blocks of 64 outputs   W words of four bytes   G groups
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F

COLUMNS = 64
GROUP = 32
_VALUES_AT_ONCE = 1 << 20  # packed; what is in between stays in a cache


class WeightFormat(StrEnum):
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def granularity(self) -> int:
        """What the number of inputs has to be a multiple of."""
        return 16 if self is WeightFormat.BFLOAT16 else GROUP


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """`data` is uint8, blocks × bytes of a block; a stack of matrices has one dimension more."""

    data: Tensor
    format: WeightFormat
    num_outputs: int
    num_inputs: int

    @property
    def num_bytes(self) -> int:
        return self.data.numel()

    def __getitem__(self, index: int) -> "PackedWeight":
        """One matrix of a stack."""
        return PackedWeight(self.data[index], self.format, self.num_outputs, self.num_inputs)


@dataclass(frozen=True, slots=True)
class Int4Values:
    """Weights that come in four bits: codes 0 … 15 (uint8, …NK), of which 32 neighbours share a
    scale and a minimum (float32, …NG)."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def __getitem__(self, index: int | slice) -> "Int4Values":
        return Int4Values(self.codes[index], self.scale[index], self.minimum[index])

    def values(self) -> Tensor:
        """Float32, in the shape of the codes."""
        codes = self.codes.unflatten(-1, (-1, GROUP))
        values: Tensor = codes * self.scale[..., None] - self.minimum[..., None]
        return values.flatten(-2)


def packed_bytes(num_outputs: int, num_inputs: int, format: WeightFormat) -> int:
    """Bytes of one packed matrix, its padding included."""
    num_blocks, block_bytes = packed_shape(num_outputs, num_inputs, format)
    return num_blocks * block_bytes


def _num_blocks(num_outputs: int) -> int:
    return -(-num_outputs // COLUMNS)


def _block_bytes(num_inputs: int, format: WeightFormat) -> int:
    if format is WeightFormat.INT4:
        return num_inputs // GROUP * COLUMNS * (GROUP // 2 + 4)
    if format is WeightFormat.INT8:
        return (num_inputs + 4) * COLUMNS
    return 2 * num_inputs * COLUMNS


def packed_shape(num_outputs: int, num_inputs: int, format: WeightFormat) -> tuple[int, int]:
    """Blocks, and bytes of each."""
    return _num_blocks(num_outputs), _block_bytes(num_inputs, format)


def pack_weight(weight_NK: Tensor | Int4Values, format: WeightFormat) -> PackedWeight:
    """Round a matrix to `format`; K is a multiple of its granularity. Int4 values stay exact.

    The specification of `cpu.packing`, which is faster.
    """
    if isinstance(weight_NK, Int4Values):
        if format is WeightFormat.INT4:
            return pack_int4(weight_NK.codes, weight_NK.scale, weight_NK.minimum)
        weight_NK = weight_NK.values()
    if format is WeightFormat.INT4:
        return pack_int4(*quantize_int4(weight_NK))
    num_outputs, num_inputs = weight_NK.shape
    assert num_inputs % format.granularity == 0
    pack_rows = _pack_bfloat16 if format is WeightFormat.BFLOAT16 else _pack_int8
    rows = max(COLUMNS, _VALUES_AT_ONCE // num_inputs // COLUMNS * COLUMNS)
    data = torch.empty(packed_shape(num_outputs, num_inputs, format), dtype=torch.uint8)
    for first in range(0, num_outputs, rows):
        blocks = pack_rows(_padded(weight_NK[first : first + rows]))
        data[first // COLUMNS :][: len(blocks)] = blocks
    return PackedWeight(data, format, num_outputs, num_inputs)


def _pack_bfloat16(weight_NK: Tensor) -> Tensor:
    return _interleaved(weight_NK.to(torch.bfloat16).contiguous().view(torch.int32))


def _pack_int8(weight_NK: Tensor) -> Tensor:
    scale_N = weight_NK.abs().amax(dim=1).float() / 127
    inverse_N1 = torch.where(scale_N > 0, 1 / scale_N, 0)[:, None]
    codes_NK = (weight_NK * inverse_N1).round_().add_(128).to(torch.uint8)
    scales_BS = scale_N.view(torch.uint8).view(-1, 4 * COLUMNS)
    return torch.cat((_interleaved(codes_NK.view(torch.int32)), scales_BS), dim=1)


def stack_packed(weights: Iterable[PackedWeight]) -> PackedWeight:
    """Matrices of one shape and format as a stack."""
    first, *rest = weights
    data = torch.stack([first.data, *(weight.data for weight in rest)])
    return PackedWeight(data, first.format, first.num_outputs, first.num_inputs)


def quantize_int4(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes_NK (uint8), scale_NG and minimum_NG: each group's range in fifteen steps."""
    groups_NGI = weight_NK.float().unflatten(1, (-1, GROUP))
    low_NG = groups_NGI.amin(2).clamp_max(0)
    scale_NG = ((groups_NGI.amax(2).clamp_min(0) - low_NG) / 15).half().float()
    minimum_NG = (-low_NG).half().float()
    inverse_NG = torch.where(scale_NG > 0, 1 / scale_NG, 0)
    codes_NGI = ((groups_NGI + minimum_NG[..., None]) * inverse_NG[..., None]).round_()
    return codes_NGI.clamp_(0, 15).flatten(1).to(torch.uint8), scale_NG, minimum_NG


def pack_int4(codes_NK: Tensor, scale_NG: Tensor, minimum_NG: Tensor) -> PackedWeight:
    """Codes 0 … 15 (uint8), scales and minima, which are rounded to float16."""
    num_outputs, num_inputs = codes_NK.shape
    assert num_inputs % GROUP == 0
    codes_NWJ = _padded(codes_NK).unflatten(1, (-1, 8))
    words_BGWCJ = (
        (codes_NWJ[..., :4] | codes_NWJ[..., 4:] << 4)
        .view(-1, COLUMNS, num_inputs // GROUP, 4, 4)
        .permute(0, 2, 3, 1, 4)
    )
    parts = [words_BGWCJ.flatten(2)]
    for values_NG in (scale_NG, minimum_NG):
        values_BCG = _padded(values_NG).half().unflatten(0, (-1, COLUMNS))
        parts.append(values_BCG.transpose(1, 2).contiguous().view(torch.uint8))
    data = torch.cat(parts, dim=2).flatten(1)
    return PackedWeight(data, WeightFormat.INT4, num_outputs, num_inputs)


def unpack_weight(weight: PackedWeight) -> Tensor:
    """The values that a packed matrix stands for, float32 N×K."""
    num_inputs, blocks = weight.num_inputs, len(weight.data)
    if weight.format is WeightFormat.BFLOAT16:
        words = weight.data.view(blocks, num_inputs // 2, COLUMNS, 4).transpose(1, 2)
        values = words.reshape(-1, 2 * num_inputs).view(torch.bfloat16).float()
    elif weight.format is WeightFormat.INT8:
        codes, scales = weight.data.split((num_inputs * COLUMNS, 4 * COLUMNS), dim=1)
        words = codes.reshape(blocks, num_inputs // 4, COLUMNS, 4).transpose(1, 2)
        scale_N1 = scales.contiguous().view(torch.float32).flatten()[:, None]
        values = (words.reshape(-1, num_inputs).float() - 128) * scale_N1
    else:
        groups = weight.data.view(blocks, num_inputs // GROUP, -1)
        words, scales, minima = groups.split((1024, 128, 128), dim=2)
        words = words.reshape(blocks, -1, 4, COLUMNS, 4).permute(0, 3, 1, 2, 4)
        codes = torch.cat((words & 15, words >> 4), dim=-1).flatten(3)
        scale, minimum = (
            part.contiguous().view(torch.float16).transpose(1, 2)[..., None].float()
            for part in (scales, minima)
        )
        values = (codes * scale - minimum).reshape(-1, num_inputs)
    return values[: weight.num_outputs]


def _padded(weight_NK: Tensor) -> Tensor:
    """Rows up to whole blocks."""
    missing = -len(weight_NK) % COLUMNS
    return F.pad(weight_NK, (0, 0, 0, missing)) if missing else weight_NK


def _interleaved(words_NW: Tensor) -> Tensor:
    """The same word (int32) of 64 rows next to each other: blocks × bytes."""
    blocks = len(words_NW) // COLUMNS
    words = words_NW.view(blocks, COLUMNS, -1).transpose(1, 2)
    return words.reshape(blocks, -1).view(torch.uint8)
