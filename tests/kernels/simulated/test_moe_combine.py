"""The kernel that ends a layer with experts, interpreted: values, bytes, and bugs put into it."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import moe_combine as module
from bezel.kernels.jit import triton_on_cpu

EPS = 1e-3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def arguments(
    num_tokens: int,
    dim: int,
    top_k: int,
    num_dense: int,
    has_scalar: bool,
    has_next: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | float | None, ...]:
    """Rows of a given dense MLP and of the residual have NaN between them."""
    generator = torch.Generator().manual_seed(num_tokens)
    y_TXD = torch.randn(num_tokens, top_k + num_dense, dim, generator=generator).to(dtype)
    rows_2TD = torch.full((2, num_tokens, dim + 8), torch.nan, dtype=dtype)[:, :, :dim]
    rows_2TD.copy_(torch.randn(2, num_tokens, dim, generator=generator))
    norms_4D = torch.rand(4, dim, generator=generator) + 0.5
    return (
        y_TXD,
        torch.rand(num_tokens, top_k, generator=generator),
        None if num_dense else rows_2TD[0],
        *norms_4D[:3],
        rows_2TD[1],
        EPS,
        torch.tensor([0.7], dtype=dtype) if has_scalar else None,
        norms_4D[3] if has_next else None,
    )


def check(module: ModuleType, *shape: int, dtype: torch.dtype) -> None:
    given = arguments(*shape, dtype=dtype)
    with watched() as watch, triton_on_cpu():
        out_TD, next_TD = module.combine_experts(*given)
    assert watch.unwritten(out_TD) == 0 and out_TD.dtype == dtype
    expected_TD, expected_next_TD = module.combine_experts_reference(
        *(x.float() if isinstance(x, Tensor) else x for x in given)
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out_TD.float(), expected_TD, atol=tolerance, rtol=tolerance)
    assert (next_TD is None) == (expected_next_TD is None)
    if next_TD is not None and expected_next_TD is not None:
        assert watch.unwritten(next_TD) == 0 and next_TD.dtype == dtype
        torch.testing.assert_close(
            next_TD.float(), expected_next_TD, atol=tolerance, rtol=tolerance
        )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([12, 64, 100, 1024, 2816]),
    st.integers(1, 8),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(TOLERANCE)),
)
def test_equals_the_reference(
    num_tokens: int,
    dim: int,
    top_k: int,
    num_dense: int,
    has_scalar: bool,
    has_next: bool,
    dtype: torch.dtype,
) -> None:
    check(module, num_tokens, dim, top_k, num_dense, has_scalar, has_next, dtype=dtype)


def test_next_is_the_norm_of_what_is_stored() -> None:
    """In bfloat16 too, where rounding comes between the two."""
    given = arguments(3, 100, 2, 0, True, True, torch.bfloat16)
    with watched(), triton_on_cpu():
        out_TD, next_TD = module.combine_experts(*given)
    assert next_TD is not None
    assert torch.equal(next_TD, module.rms_norm_reference(out_TD, given[-1], EPS))


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    y_TXD, weights_TA, _, *norms, residual_TD, eps, scalar_1, next_D = arguments(
        5, 2816, 8, 3, True, True, torch.bfloat16
    )

    def run(some: slice) -> tuple[Tensor, Tensor]:
        rows = (y_TXD[some], weights_TA[some], None, *norms, residual_TD[some])
        return module.combine_experts(*rows, eps, scalar_1, next_D)

    with watched(), triton_on_cpu():
        together, alone = run(slice(0, 5)), run(slice(3, 4))
    for of_all, of_one in zip(together, alone, strict=True):
        assert torch.equal(of_all[3:4], of_one)


def test_each_byte_moves_once() -> None:
    given = arguments(1, 2816, 8, 3, True, True, torch.bfloat16)
    with watched() as watch, triton_on_cpu():
        module.combine_experts(*given)
    assert watch.num_launches == 1 and watch.traffic_ratio == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("weight * tl.load(p_y", "weight * weight * tl.load(p_y", id="weights twice"),
        pytest.param("weight * tl.load(p_y", "tl.load(p_y", id="no weights"),
        pytest.param("i_t * TOP_K + j", "i_t * NUM_ROWS + j", id="weights of another token"),
        pytest.param("static_range(TOP_K, NUM_ROWS)", "static_range(1, NUM_ROWS)", id="dense"),
        pytest.param("range(TOP_K):", "range(NUM_ROWS):", id="dense rows routed"),
        pytest.param("inverse_rms(b_routed, D", "inverse_rms(b_dense, D", id="norm of dense"),
        pytest.param("b_routed, D, eps)", "b_routed, BLOCK_D, eps)", id="mean over the block"),
        pytest.param("b_out = (b_residual + ", "b_out = b_residual + (", id="residual unscaled"),
        pytest.param(" * b_post_norm) * scalar", " * b_post_norm)", id="no scalar"),
        pytest.param("b_mixed * inverse_rms(b_mixed, D, eps)", "b_mixed", id="no post norm"),
        pytest.param("i_t * stride_rt", "i_t * D", id="row stride of the residual"),
        pytest.param("i_t * stride_dt", "i_t * D", id="row stride of dense"),
        pytest.param("inverse_rms(b_stored, D, eps) * b_next", "b_next", id="next not normed"),
        pytest.param("out_ptr + i_t * D + o_d, b_out, mask=m_d", "out_ptr + i_t * D + o_d, b_out",
                     id="no mask"),
        pytest.param("m_d, other=0.0)", "m_d)", id="no other"),
        pytest.param(".to(tl.float32)\n", "\n", id="arithmetic in bfloat16"),
    ],
)  # fmt: skip
def test_bugs_are_noticed(old: str, new: str) -> None:
    def check_all(module: ModuleType) -> None:
        check(module, 3, 100, 2, 3, True, True, dtype=torch.bfloat16)
        check(module, 3, 100, 2, 0, True, True, dtype=torch.bfloat16)

    check_all(module)
    with mutated(module, old, new, count=0) as mutant:
        with pytest.raises((AssertionError, KernelBug)):
            check_all(mutant)
