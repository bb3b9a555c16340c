"""The norm kernels, interpreted: their values, every byte they move, and bugs put into them."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import rms_norm as module
from bezel.kernels.jit import triton_on_cpu
from bezel.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference

EPS = 1e-6
MODEL_WIDTHS = [5376, 3840, 2816, 2560, 1536, 1152, 640]
widths = st.sampled_from([1, 2, 12, 24, 64, 65, 100, 256, 1536])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])

# What one rounding may change: half a unit in the last place, and float32's own errors.
HALF_UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_rounded_once(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and expected.dtype == torch.float32
    torch.testing.assert_close(actual.float(), expected, rtol=HALF_UNIT[dtype] + 1e-5, atol=1e-5)


def rows(num_rows: int, width: int, dtype: torch.dtype, gap: int, seed: int) -> Tensor:
    """Random rows of quite different sizes, with NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.full((num_rows, width + gap), torch.nan, dtype=dtype)[:, :width]
    sizes_T1 = torch.logspace(-3, 1, num_rows)[:, None]
    return x_TD.copy_(torch.randn(num_rows, width, generator=generator) * sizes_T1)


def weights(num_rows: int, width: int, seed: int) -> Tensor:
    return torch.rand(num_rows, width, generator=torch.Generator().manual_seed(seed)) * 2 - 0.5


def check_rms_norm(rms_norm: ModuleType, x: Tensor, weight_D: Tensor | None) -> None:
    with watched({"x": x}) as watch, triton_on_cpu():
        y = rms_norm.rms_norm(x, weight_D, EPS)
    assert y.shape == x.shape and watch.unwritten(y) == 0
    assert_rounded_once(y, rms_norm_reference(x.float(), weight_D, EPS), x.dtype)


def check_add_rms_norm(
    rms_norm: ModuleType,
    x_TD: Tensor,
    weight_D: Tensor | None,
    residual_TD: Tensor,
    scalar_1: Tensor | None,
    next_weight_ND: Tensor | None,
) -> None:
    with watched() as watch, triton_on_cpu():
        y_TD, z_NTD = rms_norm.add_rms_norm(
            x_TD, weight_D, residual_TD, EPS, scalar_1, next_weight_ND
        )
    assert y_TD.shape == x_TD.shape and watch.unwritten(y_TD) == 0
    scalar = None if scalar_1 is None else scalar_1.float()
    expected_TD, _ = add_rms_norm_reference(
        x_TD.float(), weight_D, residual_TD.float(), EPS, scalar, None
    )
    assert_rounded_once(y_TD, expected_TD, x_TD.dtype)
    if next_weight_ND is None:
        assert z_NTD is None
        return
    assert z_NTD.shape == (len(next_weight_ND), *x_TD.shape) and watch.unwritten(z_NTD) == 0
    for z_TD, next_weight_D in zip(z_NTD, next_weight_ND, strict=True):
        expected_TD = rms_norm_reference(y_TD.float(), next_weight_D, EPS)
        assert_rounded_once(z_TD, expected_TD, x_TD.dtype)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 7), widths, dtypes, st.sampled_from([0, 3, 16]), st.booleans())
def test_rms_norm(
    num_rows: int, width: int, dtype: torch.dtype, gap: int, has_weight: bool
) -> None:
    x_TD = rows(num_rows, width, dtype, gap, seed=0)
    check_rms_norm(module, x_TD, weights(1, width, seed=1)[0] if has_weight else None)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 7),
    widths,
    dtypes,
    st.sampled_from([(0, 0), (16, 0), (0, 5), (2, 3)]),
    st.booleans(),
    st.sampled_from([None, torch.float32, "of x"]),
    st.integers(0, 3),
)
def test_add_rms_norm(
    num_rows: int,
    width: int,
    dtype: torch.dtype,
    gaps: tuple[int, int],
    has_weight: bool,
    scalar_dtype: torch.dtype | str | None,
    num_next: int,
) -> None:
    scalar_1 = None
    if scalar_dtype is not None:
        scalar_1 = torch.tensor([0.7], dtype=dtype if scalar_dtype == "of x" else scalar_dtype)
    check_add_rms_norm(
        module,
        rows(num_rows, width, dtype, gaps[0], seed=0),
        weights(1, width, seed=1)[0] if has_weight else None,
        rows(num_rows, width, dtype, gaps[1], seed=2),
        scalar_1,
        weights(num_next, width, seed=3) if num_next else None,
    )


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_widths_of_models(width: int) -> None:
    x_TD, residual_TD = (rows(2, width, torch.bfloat16, 0, seed) for seed in (0, 1))
    scalar_1 = torch.tensor([0.7]).bfloat16()
    check_rms_norm(module, x_TD, weights(1, width, 2)[0])
    check_add_rms_norm(
        module, x_TD, weights(1, width, 2)[0], residual_TD, scalar_1, weights(3, width, 3)
    )


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (1, 2, 2, 24), (0, 3, 24)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    check_rms_norm(module, x, weights(1, 24, 1)[0])


def test_leading_dimensions_without_a_common_stride() -> None:
    """Heads of keys, cut out of a product that holds queries and values too."""
    qkv_TN = rows(5, 24 * 4, torch.bfloat16, 0, seed=0)
    check_rms_norm(module, qkv_TN[:, 24:72].view(5, 2, 24), weights(1, 24, 1)[0])


def test_columns_with_a_stride_are_refused() -> None:
    x_TD = torch.randn(4, 48)[:, ::2]
    with triton_on_cpu():
        with pytest.raises(AssertionError):
            module.rms_norm(x_TD, None, EPS)
        with pytest.raises(AssertionError):
            module.add_rms_norm(torch.randn(4, 24), None, x_TD, EPS, None, None)


def test_a_row_does_not_depend_on_the_others() -> None:
    x_TD, residual_TD = (rows(5, 640, torch.bfloat16, 0, seed) for seed in (0, 1))
    weight_D, next_weight_ND = weights(1, 640, 2)[0], weights(2, 640, 3)

    def sums(some: slice) -> tuple[Tensor, Tensor | None]:
        return module.add_rms_norm(
            x_TD[some], weight_D, residual_TD[some], EPS, None, next_weight_ND
        )

    with watched(), triton_on_cpu():
        (y_TD, z_NTD), (y_1D, z_N1D) = sums(slice(0, 5)), sums(slice(3, 4))
    assert z_NTD is not None and z_N1D is not None
    assert torch.equal(y_TD[3:4], y_1D) and torch.equal(z_NTD[:, 3:4], z_N1D)


def test_zeros_and_huge_values_stay_finite() -> None:
    """The square of the largest bfloat16 is infinite in float32, its norm then zero."""
    most = torch.finfo(torch.bfloat16).max
    x_TD = torch.tensor([[0.0] * 12, [1e18] * 12, [most] * 12]).bfloat16()
    check_rms_norm(module, x_TD, None)
    check_add_rms_norm(module, x_TD, None, torch.ones_like(x_TD), None, torch.ones(1, 12))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_each_byte_moves_once(num_rows: int) -> None:
    x_TD, residual_TD = (rows(num_rows, 100, torch.bfloat16, 0, seed) for seed in (0, 1))
    weight_D, next_weight_ND = weights(1, 100, 2)[0], weights(3, 100, 3)
    scalar_1 = torch.tensor([0.7]).bfloat16()
    names = {"x": x_TD, "residual": residual_TD, "weight": weight_D, "next": next_weight_ND}
    with watched(names) as watch, triton_on_cpu():
        y_TD, z_NTD = module.add_rms_norm(
            x_TD, weight_D, residual_TD, EPS, scalar_1, next_weight_ND
        )
    assert z_NTD is not None and watch.num_launches == 1
    assert watch.by_name["x"].loaded == watch.by_name["residual"].loaded == num_rows * 200
    assert watch.by_name["weight"].loaded == num_rows * weight_D.nbytes
    assert watch.by_name["next"].loaded == num_rows * next_weight_ND.nbytes
    assert watch.bytes_stored == y_TD.nbytes + z_NTD.nbytes
    assert num_rows > 1 or watch.traffic_ratio == 1

    with watched(names) as watch, triton_on_cpu():
        y_TD = module.rms_norm(x_TD, weight_D, EPS)
    assert watch.bytes_loaded == num_rows * (200 + weight_D.nbytes)
    assert watch.bytes_stored == y_TD.nbytes and watch.num_launches == 1
    assert num_rows > 1 or watch.traffic_ratio == 1


def check_all(rms_norm: ModuleType) -> None:
    x_TD, residual_TD = (rows(5, 100, torch.bfloat16, 4, seed) for seed in (0, 1))
    weight_D, next_weight_ND = weights(1, 100, 2)[0], weights(3, 100, 3)
    scalar_1 = torch.tensor([0.7]).bfloat16()
    check_rms_norm(rms_norm, x_TD, weight_D)
    check_add_rms_norm(rms_norm, x_TD, weight_D, residual_TD, scalar_1, next_weight_ND)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(" / D + eps", " / D", id="no eps"),
        pytest.param("/ D + eps", "/ b_x.shape[0] + eps", id="mean over the block"),
        pytest.param("other=0.0).to(tl.float32)\n", "other=1.0).to(tl.float32)\n", id="ones"),
        pytest.param(", other=0.0).to(tl.float32)\n", ").to(tl.float32)\n", id="no other"),
        pytest.param(".to(tl.float32)\n", "\n", id="arithmetic in bfloat16"),
        pytest.param("i_t * stride_xt", "i_t * D", id="row stride of x"),
        pytest.param("i_t * stride_rt", "i_t * stride_xt + 1", id="offset of the residual"),
        pytest.param("o_d, b_y, mask=m_d)", "o_d, b_y)", id="store without mask"),
        pytest.param("D, eps) * b_weight", "D, eps)", id="no weight"),
        pytest.param("(b_residual + b_x", "(b_x", id="no residual"),
        pytest.param(" * b_weight) * b_scalar", " * b_weight)", id="no scalar"),
        pytest.param("(b_residual + b_x", "b_residual + (b_x", id="scalar on the norm only"),
        pytest.param("b_y = b_y.to(y_ptr.dtype.element_ty)", "", id="z of the unrounded y"),
        pytest.param("i_n * stride_wn", "0 * stride_wn", id="first weight for all z"),
        pytest.param("(i_n * tl.num_programs(0) + i_t)", "(i_n + i_t)", id="z rows overlap"),
        pytest.param("NUM_NEXT=num_next", "NUM_NEXT=num_next - 1", id="a z left out"),
    ],
)
def test_bugs_are_noticed(old: str, new: str) -> None:
    check_all(module)
    with mutated(module, old, new, count=0) as mutant:
        with pytest.raises((AssertionError, KernelBug)):
            check_all(mutant)
