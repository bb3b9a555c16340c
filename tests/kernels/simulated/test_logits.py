"""The kernels for softcap and edits, interpreted."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import logits as module
from bezel.kernels.jit import triton_on_cpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check_softcap(logits: ModuleType, x_NV: Tensor, cap: float) -> None:
    with watched() as watch, triton_on_cpu():
        y_NV = logits.softcap(x_NV, cap)
    assert watch.unwritten(y_NV) == 0 and y_NV.dtype == torch.float32
    expected_NV = (x_NV.double() / cap).tanh() * cap
    torch.testing.assert_close(y_NV, expected_NV.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


def check_edits(logits: ModuleType, num_rows: int, vocab_size: int, num_edits: int) -> None:
    """Some of all positions, in random order, and a few numbers that the formula turns on."""
    generator = torch.Generator().manual_seed(num_edits)
    x_NV = torch.randn(num_rows, vocab_size, generator=generator)
    x_NV[:, ::3] = 0.0
    chosen_E = torch.randperm(num_rows * vocab_size, generator=generator)[:num_edits]
    positions_E = torch.full((-(-len(chosen_E) // 16) * 16,), -1)
    positions_E[: len(chosen_E)] = chosen_E
    values_3E = torch.rand(3, len(positions_E), generator=generator) * 2 + 0.1
    values_3E[2, ::4] = -torch.inf
    expected_NV = x_NV.clone()
    module.edit_logits_reference(expected_NV, positions_E, values_3E)
    with watched({"logits": x_NV}) as watch, triton_on_cpu():
        logits.edit_logits(x_NV, positions_E, values_3E)
    assert torch.equal(x_NV, expected_NV)
    assert watch.by_name["logits"].loaded == watch.by_name["logits"].stored == 4 * len(chosen_E)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 5),
    st.sampled_from([1, 3, 255, 2047, 2048, 2049, 5000]),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 30.0, 50.0]),
)
def test_softcap(num_rows: int, vocab_size: int, dtype: torch.dtype, cap: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    x_NV = torch.full((num_rows, vocab_size + 5), torch.nan, dtype=dtype)[:, :vocab_size]
    x_NV.copy_(torch.randn(num_rows, vocab_size, generator=generator) * 40)
    check_softcap(module, x_NV, cap)


def test_softcap_of_huge_tiny_and_undefined_logits() -> None:
    infinite = torch.inf
    x_NV = torch.tensor([[infinite, -infinite, 3e38, -3e38, 1e-30, -0.0, torch.nan, 1300.0]])
    check_softcap(module, x_NV, 30.0)


def test_softcap_moves_each_byte_once() -> None:
    x_NV = torch.randn(3, 5000).bfloat16()
    with watched() as watch, triton_on_cpu():
        module.softcap(x_NV, 30.0)
    assert watch.traffic_ratio == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 7, 100, 999]), st.sampled_from([1, 16, 17, 256, 700]))
def test_edits(num_rows: int, vocab_size: int, num_edits: int) -> None:
    check_edits(module, num_rows, vocab_size, num_edits)


def test_without_a_cap_nothing_is_launched() -> None:
    x_NV = torch.randn(2, 9).bfloat16()
    with watched() as watch, triton_on_cpu():
        assert module.softcap(x_NV, None) is x_NV
    assert watch.num_launches == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("2.0 * 1.4426950408889634", "1.4426950408889634", id="half the argument"),
        pytest.param("cap - 2.0 * cap / (1.0", "cap - 2.0 * cap / (2.0", id="denominator"),
        pytest.param("2.0 * cap / (1.0 + b_power)", "2.0 * cap * b_power / (1.0 + b_power)",
                     id="NaN of infinities"),
        pytest.param("i_n * stride_xn", "i_n * V", id="row stride"),
        pytest.param("m_v = o_v < V", "m_v = o_v <= V", id="one logit too many"),
        pytest.param("m_e = i_e >= 0", "m_e = o_e < E", id="padding edited"),
        pytest.param("b_x > 0", "b_x >= b_bias", id="wrong branch"),
        pytest.param("b_x - b_subtracted + b_bias", "b_x - b_subtracted", id="no bias"),
        pytest.param("values_ptr + E", "values_ptr", id="subtracted is the penalty"),
        pytest.param("2 * E", "E", id="bias is what is subtracted"),
        pytest.param("* BLOCK_E + tl.arange", "* 16 + tl.arange", id="edits made twice"),
    ],
)  # fmt: skip
def test_bugs_are_noticed(old: str, new: str) -> None:
    x_NV = torch.full((3, 2500), torch.nan)[:, :2300]
    x_NV.copy_(torch.randn(3, 2300, generator=torch.Generator().manual_seed(0)) * 40)
    x_NV[0, :2] = torch.tensor([3e38, -3e38])
    with mutated(module, old, new) as mutant, pytest.raises((KernelBug, AssertionError)):
        check_softcap(mutant, x_NV, 30.0)
        check_softcap(mutant, x_NV.contiguous(), 30.0)
        check_edits(mutant, 3, 400, 500)
