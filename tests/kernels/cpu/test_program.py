"""Recorded launches: the same results, again and again, and an end to what can't be recorded."""

import pytest
import torch

from bezel.kernels.cpu.launch import Arena, CannotRecord, Launch, Recording
from bezel.kernels.cpu.program import Program, threads_run_together
from bezel.kernels.gelu_mul import gelu_mul
from bezel.kernels.linear import linear
from bezel.kernels.packed import WeightFormat, pack_weight
from bezel.kernels.rms_norm import rms_norm

DIM = 640


def weights() -> tuple[list, torch.Tensor]:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(0)
    formats = [WeightFormat.INT8, WeightFormat.INT4, WeightFormat.BFLOAT16]
    shapes = [(2 * DIM, DIM), (DIM, DIM), (DIM, DIM)]
    matrices = [
        pack_weight(torch.randn(*shape, generator=generator) * DIM**-0.5, format)
        for shape, format in zip(shapes, formats, strict=True)
    ]
    return matrices, torch.rand(DIM, generator=generator) + 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_program_computes_what_its_launches_do(dtype: torch.dtype) -> None:
    (wide, middle, last), norm = weights()

    def compute(x: torch.Tensor) -> torch.Tensor:
        hidden = gelu_mul(linear(rms_norm(x, norm, 1e-6), wide))
        return linear(linear(hidden, middle), last)

    x = torch.empty(3, DIM, dtype=dtype)
    with Recording(Arena(1 << 24)) as recording:
        y = compute(x)
    program = Program(recording.launches)
    for seed in range(20):
        x.copy_(torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed)))
        program.run()
        assert torch.equal(y, compute(x))
    kinds = ["norm", "quantize", "multiply_int8", "gelu", "quantize", "multiply_int4"]
    assert program.names == [*kinds, "multiply_bfloat16"]
    y.zero_()
    for i in range(len(program.names)):
        program.run(i, i + 1)
    assert torch.equal(y, compute(x))


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    arena = Arena(1 << 12)
    first, second = arena.take(100), arena.take(100)
    place = torch.frombuffer(first, dtype=torch.uint8).data_ptr()
    del first
    assert torch.frombuffer(arena.take(64), dtype=torch.uint8).data_ptr() == place
    del second
    with pytest.raises(CannotRecord):
        arena.take(1 << 13)


def test_what_python_has_to_do_ends_a_recording() -> None:
    with pytest.raises(CannotRecord), Recording(Arena(1 << 12)):
        torch.ones(4).sort()
    with pytest.raises(CannotRecord):
        Program([Launch("unheard of", 1, ())])


def test_a_program_is_of_one_dtype() -> None:
    wide = weights()[0][0]
    with Recording(Arena(1 << 24)) as recording:
        for dtype in (torch.bfloat16, torch.float32):
            linear(torch.empty(3, DIM, dtype=dtype), wide)
    with pytest.raises(CannotRecord):
        Program(recording.launches)


def test_threads_meet() -> None:
    assert threads_run_together()
