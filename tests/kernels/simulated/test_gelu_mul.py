"""The gated GELU kernel, interpreted: its values, every byte it moves, and bugs put into it."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import gelu_mul as module
from bezel.kernels.gelu_mul import gelu_times_reference
from bezel.kernels.jit import triton_on_cpu

FEED_FORWARD_WIDTHS = [21504, 15360, 12288, 10240, 6144, 2112, 704, 2048]
widths = st.sampled_from([1, 2, 12, 33, 48, 64, 256, 1000, 1024, 1025, 2112])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])

# What one rounding may change: half a unit in the last place, and float32's own errors.
HALF_UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def rows(num_rows: int, width: int, dtype: torch.dtype, gap: int, seed: int) -> Tensor:
    """Random rows, most values where GELU bends, with NaN between the rows."""
    generator = torch.Generator().manual_seed(seed)
    x_TE = torch.full((num_rows, width + gap), torch.nan, dtype=dtype)[:, :width]
    return x_TE.copy_(torch.randn(num_rows, width, generator=generator) * 2)


def check_values(y_TE: Tensor, gate_TE: Tensor, factor_TE: Tensor) -> None:
    assert y_TE.dtype == gate_TE.dtype
    expected_TE = gelu_times_reference(gate_TE.double(), factor_TE.double()).float()
    torch.testing.assert_close(
        y_TE.float(), expected_TE, rtol=HALF_UNIT[y_TE.dtype] + 1e-5, atol=1e-5
    )


def check_gelu_times(gelu_mul: ModuleType, gate_TE: Tensor, factor_TE: Tensor) -> None:
    with watched({"gate": gate_TE, "factor": factor_TE}) as watch, triton_on_cpu():
        y_TE = gelu_mul.gelu_times(gate_TE, factor_TE)
    assert y_TE.shape == gate_TE.shape and watch.unwritten(y_TE) == 0
    check_values(y_TE, gate_TE, factor_TE)


def check_gelu_mul(gelu_mul: ModuleType, gate_up_TF2: Tensor) -> None:
    with watched() as watch, triton_on_cpu():
        y_TF = gelu_mul.gelu_mul(gate_up_TF2)
    width = gate_up_TF2.shape[1] // 2
    assert y_TF.shape == (len(gate_up_TF2), width) and watch.unwritten(y_TF) == 0
    check_values(y_TF, gate_up_TF2[:, :width], gate_up_TF2[:, width:])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), widths, dtypes, st.sampled_from([0, 3, 16]))
def test_gelu_mul(num_rows: int, width: int, dtype: torch.dtype, gap: int) -> None:
    check_gelu_mul(module, rows(num_rows, 2 * width, dtype, gap, seed=0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), widths, dtypes, st.sampled_from([(0, 0), (0, 16), (5, 0), (2, 3)]))
def test_gelu_times(num_rows: int, width: int, dtype: torch.dtype, gaps: tuple[int, int]) -> None:
    gate_TE, factor_TE = (rows(num_rows, width, dtype, gap, gap) for gap in gaps)
    check_gelu_times(module, gate_TE, factor_TE)


@pytest.mark.parametrize("width", FEED_FORWARD_WIDTHS)
def test_widths_of_models(width: int) -> None:
    check_gelu_mul(module, rows(2, 2 * width, torch.bfloat16, 0, seed=0))


def test_a_layer_s_view_of_the_per_layer_embeddings() -> None:
    mixed_TLE = rows(3, 4 * 256, torch.bfloat16, 0, seed=0).view(3, 4, 256)
    gate_TE = rows(3, 256, torch.bfloat16, 0, seed=1)
    for factor_TE in mixed_TLE.unbind(1):
        check_gelu_times(module, gate_TE, factor_TE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_finite_gate_gives_a_finite_gelu(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 5.0, 8.0, 13.0, 20.0, 100.0, 1e4, most])
    gate_TE = torch.cat([sizes, -sizes]).to(dtype)[None]
    with watched(), triton_on_cpu():
        y_TE = module.gelu_times(gate_TE, torch.ones_like(gate_TE))
    assert y_TE.isfinite().all()
    check_values(y_TE, gate_TE, torch.ones_like(gate_TE))
    assert torch.equal(y_TE[0, 9:11], gate_TE[0, 9:11])
    assert y_TE[0, -2:].abs().tolist() == [0.0, 0.0]


def test_columns_with_a_stride_are_refused() -> None:
    x_TE = torch.randn(4, 48)[:, ::2]
    with triton_on_cpu():
        with pytest.raises(AssertionError):
            module.gelu_times(x_TE, torch.randn(4, 24))
        with pytest.raises(AssertionError):
            module.gelu_times(torch.randn(4, 24), x_TE)


@pytest.mark.parametrize("width", [100, 1025])
def test_each_byte_moves_once(width: int) -> None:
    gate_up_TF2 = rows(3, 2 * width, torch.bfloat16, 0, seed=0)
    with watched() as watch, triton_on_cpu():
        y_TF = module.gelu_mul(gate_up_TF2)
    assert watch.bytes_loaded == gate_up_TF2.nbytes and watch.bytes_stored == y_TF.nbytes
    assert watch.traffic_ratio == 1 and watch.num_launches == 1


def check_all(gelu_mul: ModuleType) -> None:
    check_gelu_mul(gelu_mul, rows(3, 2 * 1030, torch.bfloat16, 0, seed=0))
    check_gelu_times(gelu_mul, rows(3, 24, torch.float32, 8, 1), rows(3, 24, torch.float32, 16, 2))
    check_gelu_times(gelu_mul, torch.tensor([[1e4, -1e4]]), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("gate_TF, up_TF = ", "up_TF, gate_TF = ", id="halves swapped"),
        pytest.param("1.0 + 0.044715", "1.0 + 0.0447", id="cubic constant"),
        pytest.param("0.7978845608028654", "0.8", id="tanh constant"),
        pytest.param("1.4426950408889634", "1.0", id="power of 2 for power of e"),
        pytest.param("(2.0 * 0.79", "(1.0 * 0.79", id="u for 2u"),
        pytest.param(
            "b_x / (1.0 + tl.exp2(-1.4426950408889634 * b_2u))",
            "b_x * tl.exp(b_2u) / (1.0 + tl.exp(b_2u))",
            id="overflow",
        ),
        pytest.param("i_t * stride_ft", "i_t * stride_gt", id="row stride of the factor"),
        pytest.param("i_t * stride_gt", "i_t * E", id="row stride of the gate"),
        pytest.param("tl.program_id(1) * BLOCK_E", "0", id="first block for all"),
        pytest.param("triton.cdiv(width, block)", "width // block", id="last block left out"),
        pytest.param("m_e = o_e < E", "m_e = o_e < BLOCK_E * 2", id="no mask"),
        pytest.param(" * b_factor, mask", ", mask", id="no factor"),
        pytest.param(".to(tl.float32)\n", "\n", id="arithmetic in bfloat16"),
    ],
)
def test_bugs_are_noticed(old: str, new: str) -> None:
    check_all(module)
    with mutated(module, old, new, count=0) as mutant:
        with pytest.raises((AssertionError, KernelBug)):
            check_all(mutant)
