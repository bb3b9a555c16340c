"""The routing kernel, interpreted: its choices and weights, its bytes, and bugs put into it."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import moe_route as module
from bezel.kernels.jit import triton_on_cpu

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def random_scores(
    num_tokens: int, num_experts: int, dtype: torch.dtype, num_levels: int | None = None
) -> Tensor:
    """Rows with NaN between them; few levels make many scores equal."""
    generator = torch.Generator().manual_seed(num_tokens)
    scores_TE = torch.full((num_tokens, num_experts + 3), torch.nan, dtype=dtype)[:, :num_experts]
    values = torch.randn(num_tokens, num_experts, generator=generator) * 3
    if num_levels is not None:
        values = values.remainder(num_levels).floor()
    return scores_TE.copy_(values)


def check(module: ModuleType, scores_TE: Tensor, scale_E: Tensor, top_k: int) -> None:
    with watched() as watch, triton_on_cpu():
        chosen_TA, weights_TA = module.route(scores_TE, scale_E, top_k)
    assert watch.unwritten(chosen_TA) == watch.unwritten(weights_TA) == 0
    expected_TA, expected_weights_TA = module.route_reference(scores_TE, scale_E, top_k)
    assert chosen_TA.dtype == torch.int32 and torch.equal(chosen_TA, expected_TA)
    torch.testing.assert_close(weights_TA, expected_weights_TA, atol=1e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 4, 6, 16, 100, 128]),
    st.integers(1, 8),
    st.sampled_from([None, 1, 2, 5]),
    dtypes,
)
def test_equals_the_reference(
    num_tokens: int, num_experts: int, top_k: int, num_levels: int | None, dtype: torch.dtype
) -> None:
    scores_TE = random_scores(num_tokens, num_experts, dtype, num_levels)
    scale_E = torch.rand(num_experts, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(module, scores_TE, scale_E, min(top_k, num_experts))


def test_ids_stay_in_range_whatever_the_scores() -> None:
    scores_TE = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    scores_TE[0] = torch.nan
    scores_TE[1, ::2] = torch.nan
    scores_TE[2] = -torch.inf
    scores_TE[3, 5:] = torch.inf
    with watched(), triton_on_cpu():
        chosen_TA, weights_TA = module.route(scores_TE, torch.ones(100), 8)
    assert chosen_TA.min() >= 0 and chosen_TA.max() < 100
    assert all(len(set(chosen)) == 8 for chosen in chosen_TA.tolist())
    assert weights_TA[0].isnan().all()  # NaN goes on to the logits, where it ends the request
    assert chosen_TA[1].remainder(2).eq(1).all() and weights_TA[1].isfinite().all()


def test_each_byte_moves_once() -> None:
    scores_TE = random_scores(5, 128, torch.bfloat16)
    with watched({"scores": scores_TE}) as watch, triton_on_cpu():
        module.route(scores_TE, torch.ones(128), 8)
    assert watch.num_launches == 1
    assert watch.by_name["scores"].loaded == 5 * 128 * 2
    assert watch.bytes_stored == 5 * 8 * (4 + 4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(" / tl.sum(b_exp, 1)[:, None]", "", id="not normalised"),
        pytest.param("b_weights * b_scale", "b_weights", id="no per-expert scale"),
        pytest.param("scale_ptr + b_chosen", "scale_ptr + o_a[None, :]", id="scale of the slot"),
        pytest.param("tl.min(tl.where(m_best", "tl.max(tl.where(m_best", id="any id"),
        pytest.param("o_e[None, :], BLOCK_E), 1)", "-o_e[None, :], 0), 1) * -1", id="last id"),
        pytest.param("m_free & (o_e[None, :] != b_id[:, None])", "m_free", id="one expert twice"),
        pytest.param("o_t[:, None] * stride_st", "o_t[:, None] * num_experts", id="row stride"),
        pytest.param("& (o_e < num_experts)[None, :]\n", "\n", id="scores of no expert"),
        pytest.param('other=float("-inf")', "other=0.0", id="experts past the last"),
        pytest.param("m_out = m_t[:, None] &", "m_out =", id="padded tokens written"),
        pytest.param("triton.cdiv(num_tokens, _BLOCK_T)", "1", id="first tokens only"),
        pytest.param("tl.exp(b_top", "tl.exp2(b_top", id="power of two"),
    ],
)
def test_bugs_are_noticed(old: str, new: str) -> None:
    scale_E = torch.linspace(0.5, 2, 6).bfloat16()

    def check_all(module: ModuleType) -> None:
        check(module, random_scores(5, 6, torch.bfloat16, num_levels=3).sub_(4), scale_E, 3)

    check_all(module)
    with mutated(module, old, new, count=0) as mutant:
        with pytest.raises((AssertionError, KernelBug)):
            check_all(mutant)
