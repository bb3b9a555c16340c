"""The experts' grouped products, interpreted: values, what is read how often, and bugs put in."""

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, Watch, watched
from torch import Tensor

from bezel.kernels import moe_gemm, moe_mlp
from bezel.kernels.jit import triton_on_cpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ARCHITECTURES = ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"]


@dataclass(frozen=True)
class Case:
    """Arguments of `moe_mlp`. Weights of experts that nobody chose are NaN, so is what lies between
    rows of x."""

    x_routed_TD: Tensor
    x_dense_TD: Tensor | None
    chosen_TA: Tensor
    gate_up_EFD: Tensor
    down_EDF: Tensor
    dense_gate_up_FD: Tensor | None
    dense_down_DF: Tensor | None

    def of_tokens(self, tokens: slice) -> "Case":
        dense_TD = None if self.x_dense_TD is None else self.x_dense_TD[tokens]
        return replace(
            self,
            x_routed_TD=self.x_routed_TD[tokens],
            x_dense_TD=dense_TD,
            chosen_TA=self.chosen_TA[tokens].contiguous(),
        )

    def run(self, architecture: str = "sm_90", seed: int = 0) -> tuple[Tensor, Watch]:
        names = {"gate_up": self.gate_up_EFD, "down": self.down_EDF, "x": self.x_routed_TD}
        if self.dense_gate_up_FD is not None and self.dense_down_DF is not None:
            names |= {"dense_gate_up": self.dense_gate_up_FD, "dense_down": self.dense_down_DF}
        with watched(names, seed=seed) as watch, triton_on_cpu(architecture):
            y_TXD = moe_mlp.moe_mlp(*vars(self).values())
        return y_TXD, watch

    def expected(self) -> Tensor:
        arguments = vars(self).values()
        return moe_mlp.moe_mlp_reference(
            *(a if a is None or not a.is_floating_point() else a.double() for a in arguments)
        )


def case(
    num_tokens: int,
    num_experts: int = 16,
    top_k: int = 8,
    num_dense: int = 4,
    dim: int = 64,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    skew: float = 0.0,
) -> Case:
    """Random values of size 1 in x and about that in y; skew as in one expert for all tokens."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x_2TD = torch.full((2, num_tokens, dim + 16), torch.nan, dtype=dtype)[:, :, :dim]
    x_2TD.copy_(normal(2, num_tokens, dim))
    noise_TE = torch.rand(num_tokens, num_experts, generator=generator)
    chosen_TA = (noise_TE + skew * torch.arange(num_experts)).argsort(1)[:, :top_k].int()
    gate_up_EFD = normal(num_experts, 2 * width, dim) * dim**-0.5
    down_EDF = normal(num_experts, dim, width) * width**-0.5
    is_used_E = torch.zeros(num_experts, dtype=torch.bool)
    is_used_E[chosen_TA.flatten().long()] = True
    gate_up_EFD[~is_used_E] = torch.nan
    down_EDF[~is_used_E] = torch.nan
    weights = (gate_up_EFD, down_EDF)
    if num_dense == 0:
        return Case(x_2TD[0], None, chosen_TA.contiguous(), *weights, None, None)
    dense_gate_up_FD = normal(2 * num_dense * width, dim) * dim**-0.5
    dense_down_DF = normal(dim, num_dense * width) * width**-0.5
    dense = (dense_gate_up_FD, dense_down_DF)
    return Case(x_2TD[0], x_2TD[1], chosen_TA.contiguous(), *weights, *dense)


def check(case: Case, architecture: str = "sm_90") -> None:
    y_TXD, watch = case.run(architecture)
    assert watch.unwritten(y_TXD) == 0
    dtype = case.x_routed_TD.dtype
    assert y_TXD.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y_TXD.double(), case.expected(), atol=tolerance, rtol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 5, 16, 33, 64]),
    st.integers(1, 8),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([(64, 24), (100, 40), (24, 8)]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from(ARCHITECTURES),
)
def test_equals_the_reference(
    num_tokens: int,
    top_k: int,
    num_dense: int,
    sizes: tuple[int, int],
    skew: float,
    dtype: torch.dtype,
    architecture: str,
) -> None:
    drawn = case(num_tokens, 8, top_k, num_dense, *sizes, dtype, skew)
    check(drawn, architecture)


@pytest.mark.parametrize("num_tokens", [65, 200])
@pytest.mark.parametrize(("top_k", "skew"), [(8, 0.0), (1, 1.0)])
def test_many_tokens(num_tokens: int, top_k: int, skew: float) -> None:
    check(case(num_tokens, 16, top_k, 0, dtype=torch.bfloat16, skew=skew))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_block_size(architecture: str) -> None:
    for num_tokens in (5, 8, 16, 32):
        check(case(num_tokens, 4, 4, 0, dtype=torch.bfloat16), architecture)


def test_widths_of_gemma_4() -> None:
    check(case(1, 1, 1, 1, 2816, 704, torch.bfloat16))


@pytest.mark.parametrize("num_tokens", [4, 40])
def test_programs_run_in_any_order(num_tokens: int) -> None:
    drawn = case(num_tokens, dtype=torch.bfloat16)
    first, second = (drawn.run(seed=seed)[0] for seed in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_tokens", [4, 16])
def test_a_token_does_not_depend_on_its_neighbours(num_tokens: int) -> None:
    """Alone without sorting, with others as sorted rows: the same sums in the same order."""
    drawn = case(num_tokens, 128, 8, 3)
    y_TXD, _ = drawn.run()
    for t in (0, num_tokens - 1):
        alone_TXD, _ = drawn.of_tokens(slice(t, t + 1)).run()
        assert torch.equal(y_TXD[t : t + 1], alone_TXD)


def test_weights_are_read_once() -> None:
    """Those of the experts chosen, for all tokens together; x once per tile of columns."""
    drawn = case(24, 32, 4, 3, 64, 128, torch.bfloat16)
    _, watch = drawn.run()
    num_used = len(drawn.chosen_TA.unique())
    assert num_used < 32
    assert drawn.dense_gate_up_FD is not None and drawn.dense_down_DF is not None
    assert watch.by_name["gate_up"].loaded == num_used * drawn.gate_up_EFD[0].nbytes
    assert watch.by_name["down"].loaded == num_used * drawn.down_EDF[0].nbytes
    assert watch.by_name["dense_gate_up"].loaded == drawn.dense_gate_up_FD.nbytes
    assert watch.by_name["dense_down"].loaded == drawn.dense_down_DF.nbytes
    assert watch.by_name["x"].loaded == 2 * 4 * 24 * 64 * 2
    assert watch.num_launches == 3


def check_all() -> None:
    """Sorted and unsorted, parts of a dense MLP, several rows to a block, odd and even sizes."""
    check(case(3, 6, 2, 2, 72, 40, torch.bfloat16))
    check(case(40, 6, 2, 3, 72, 40, torch.bfloat16, skew=0.3))
    check(case(5, 6, 2, 3, 256, 64, torch.bfloat16))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("gelu_tanh(acc_gate) * acc_up", "acc_gate * gelu_tanh(acc_up)", id="swapped"),
        pytest.param("gelu_tanh(acc_gate) * acc_up", "gelu_tanh(acc_gate * acc_up)", id="of both"),
        pytest.param("mask=m_row[:, None], other=0.0", "mask=o_k[None, :] >= 0", id="padding"),
        pytest.param("mask=m_row[:, None] & ", "mask=", id="padding rows read"),
        pytest.param("k_left)[None, :], other=0.0", "k_left)[None, :]", id="no other"),
        pytest.param("(o_k < k_left)[None, :]", "(o_k >= 0)[None, :]", id="past the columns"),
        pytest.param("* 2 * F * D", "* F * D", id="stride of an expert's gate"),
        pytest.param("expert.to(tl.int64) * D * F, F", "expert.to(tl.int64) * D, F", id="of down"),
        pytest.param("        num_gate_rows = F\n", "        num_gate_rows = 0\n", id="up is gate"),
        pytest.param("num_gate_rows = num_dense * F", "num_gate_rows = F", id="rows of dense up"),
        pytest.param("dense_weights_ptr + dense * F,", "dense_weights_ptr,", id="dense columns"),
        pytest.param("dense * F, num_dense * F", "dense * F, F", id="dense row stride"),
        pytest.param("x_dense_ptr, stride_xdt\n", "x_ptr, stride_xt\n", id="x of the experts"),
        pytest.param("(TOP_K + i_m - num_routed) * num_tokens", "TOP_K * num_tokens", id="race"),
        pytest.param("end = first + num_tokens", "end = first + 16", id="dense tokens past 16"),
        pytest.param("b_token = b_slot // TOP_K", "b_token = b_slot % TOP_K", id="token of slot"),
        pytest.param("b_choice = b_slot % TOP_K", "b_choice = 0 * b_slot", id="choice of slot"),
        pytest.param("sorted_slots_ptr + o_row", "sorted_slots_ptr + o_row + 1", id="next slot"),
        pytest.param("o_y = b_token.to(tl.int64) * (TOP_K + num_dense)", "o_y = b_token", id="y"),
        pytest.param("        end = i_m + 1\n", "        end = i_m + 2\n", id="slots of others"),
        pytest.param("    if expert < 0:\n        return\n", "", id="unused blocks"),
        pytest.param("num_m - i_group * GROUP_M, GROUP_M", "GROUP_M, GROUP_M", id="last group"),
        pytest.param("tl.zeros([BLOCK_M, BLOCK_N]", "tl.full([BLOCK_M, BLOCK_N], 1", id="from 1"),
        pytest.param("range(0, F, BLOCK_K)", "range(BLOCK_K, F, BLOCK_K)", id="first columns"),
    ],
)
def test_bugs_are_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all()

    def use(module: ModuleType) -> None:
        monkeypatch.setattr(moe_mlp, "gate_up_kernel", module.gate_up_kernel)
        monkeypatch.setattr(moe_mlp, "down_kernel", module.down_kernel)

    with mutated(moe_gemm, old, new, count=0) as mutant:
        use(mutant)
        with pytest.raises((AssertionError, KernelBug)):
            check_all()
