"""The sorting kernels, interpreted: places and blocks to the last one, and bugs put into them."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import moe_dispatch as module
from bezel.kernels.jit import triton_on_cpu


def random_choices(num_tokens: int, num_experts: int, top_k: int, skew: float) -> Tensor:
    """Distinct experts for each token; the higher `skew`, the more often the last ones."""
    generator = torch.Generator().manual_seed(num_tokens)
    noise_TE = torch.rand(num_tokens, num_experts, generator=generator)
    chosen_TA = (noise_TE + skew * torch.arange(num_experts)).argsort(1, descending=True)
    return chosen_TA[:, :top_k].int().contiguous()


def check(module: ModuleType, chosen_TA: Tensor, num_experts: int, block_rows: int) -> None:
    with watched() as watch, triton_on_cpu():
        sorted_slots_N, blocks_M3 = module.dispatch(chosen_TA, num_experts, block_rows)
    assert watch.unwritten(sorted_slots_N) == watch.unwritten(blocks_M3) == 0
    expected_N, expected_M3 = module.dispatch_reference(chosen_TA, num_experts, block_rows)
    assert torch.equal(sorted_slots_N, expected_N)
    assert torch.equal(blocks_M3, expected_M3)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 5, 16, 17, 33, 64, 65, 200]),
    st.sampled_from([4, 16, 100, 128]),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.sampled_from([16, 32, 64, 128]),
)
def test_equals_the_reference(
    num_tokens: int, num_experts: int, top_k: int, skew: float, block_rows: int
) -> None:
    chosen_TA = random_choices(num_tokens, num_experts, min(top_k, num_experts), skew)
    check(module, chosen_TA, num_experts, block_rows)


@pytest.mark.parametrize("num_tokens", [512, 8192])
def test_long_prefill(num_tokens: int) -> None:
    check(module, random_choices(num_tokens, 128, 8, 0.001), 128, 128)


def test_few_slots_take_one_launch() -> None:
    for num_tokens, num_launches in ((16, 1), (17, 2)):
        with watched() as watch, triton_on_cpu():
            module.dispatch(random_choices(num_tokens, 128, 8, 0.0), 128, 16)
        assert watch.num_launches == num_launches


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("tl.cumsum(b_ones, 0) - 1", "tl.cumsum(b_ones, 0)", id="rank off by one"),
        pytest.param("b_first + b_before", "b_first", id="earlier programs forgotten"),
        pytest.param("o_q < i_p", "o_q <= i_p", id="own program counted twice"),
        pytest.param("        b_next += tl.sum(b_ones, 0)\n", "", id="earlier slots forgotten"),
        pytest.param("b_end - b_total", "b_end", id="first is the end"),
        pytest.param("tl.minimum(i_begin + slots_per_program, num_slots)", "num_slots", id="all"),
        pytest.param("b_next = b_first", "b_next = b_first // block_rows", id="places of blocks"),
        pytest.param("(b_total + block_rows - 1) //", "b_total //", id="no last block"),
        pytest.param("tl.minimum(b_row + block_rows, b_stop)", "b_row + block_rows", id="no end"),
        pytest.param("b_nth * block_rows", "b_nth", id="blocks overlap"),
        pytest.param("o_e[None, :] + 1, 0), 1) - 1", "o_e[None, :], 0), 1)", id="unused is 0"),
        pytest.param("num_programs * BLOCK_N)", "num_blocks)", id="not all blocks"),
        pytest.param("COUNTED=num_programs > 1", "COUNTED=False", id="counted by each"),
        pytest.param(", other=0)", ")", id="no other"),
    ],
)
def test_bugs_are_noticed(old: str, new: str) -> None:
    def check_all(module: ModuleType) -> None:
        check(module, random_choices(12, 100, 8, 0.002), 100, 16)
        check(module, random_choices(290, 10, 8, 0.01), 10, 16)

    check_all(module)
    with mutated(module, old, new, count=0) as mutant:
        with pytest.raises((AssertionError, KernelBug)):
            check_all(mutant)
