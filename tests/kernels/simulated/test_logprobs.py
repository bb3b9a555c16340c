"""The kernels for log-probabilities, interpreted."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import logprobs as module
from bezel.kernels.jit import triton_on_cpu


def check(logprobs: ModuleType, logits_NV: Tensor, num_top: int) -> None:
    num_rows, vocab_size = logits_NV.shape
    generator = torch.Generator().manual_seed(1)
    token_ids_N = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    expected = module.logprobs_reference(logits_NV, token_ids_N, num_top)
    with watched() as watch, triton_on_cpu():
        actual = logprobs.logprobs(logits_NV, token_ids_N, num_top)
    assert all(watch.unwritten(x) == 0 for x in actual if x.numel())
    assert actual[2].dtype == torch.int64 and torch.equal(actual[2], expected[2])
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-5, atol=1e-5)


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """With NaN between the rows."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_NV = torch.full((num_rows, vocab_size + 9), torch.nan, dtype=dtype)[:, :vocab_size]
    return logits_NV.copy_(torch.randn(num_rows, vocab_size, generator=generator) * 6)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([20, 21, 300, 2048, 2049, 5000]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0, 1, 5, 20]),
)
def test_logprobs(num_rows: int, vocab_size: int, dtype: torch.dtype, num_top: int) -> None:
    check(module, random_logits(num_rows, vocab_size, dtype), num_top)


def test_equal_and_banned_logits_and_very_large_ones() -> None:
    """The whole row is searched: its list overflows, or has fewer tokens than are asked for."""
    logits_NV = torch.full((4, 3000), 500.0)
    logits_NV[1, 1000:] = -torch.inf
    logits_NV[2] = -torch.inf
    logits_NV[2, [7, 2999, 300]] = torch.tensor([-800.0, 1.0, 1.5])
    logits_NV[3, ::2] = 501.0
    check(module, logits_NV, 9)


def test_a_block_without_any_token_left() -> None:
    logits_NV = random_logits(2, 5000, torch.float32)
    logits_NV[0, :2048] = -torch.inf
    logits_NV[1, 4000:] = -torch.inf
    check(module, logits_NV, 4)


def test_a_whole_vocabulary() -> None:
    check(module, random_logits(1, 262_144, torch.bfloat16), 20)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("b_sum * tl.exp(b_maximum - safe)", "b_sum", id="sums joined unscaled"),
        pytest.param("o_v < V)", "o_v <= V)", id="one logit too many"),
        pytest.param("i_n * stride_ln + o_v", "i_n * V + o_v", id="row stride"),
        pytest.param("safe + tl.log", "tl.log", id="no maximum in the sum"),
        pytest.param("tl.sum(b_count, 0) >= num_top", "tl.sum(b_count, 0) >= 0", id="short list"),
        pytest.param("(tl.max(b_count, 0) <= SLOTS) & ", "", id="list that overflowed"),
        pytest.param("b_key < last_key", "b_key <= last_key", id="the same again"),
        pytest.param("key_value(last_key) - log_sum", "key_value(last_key)", id="top logits"),
        pytest.param("i_n * num_top + i_m, key_token", "i_m, key_token", id="ids of one row"),
        pytest.param("tl.store(chosen_ptr + i_n, value - log_sum)",
                     "tl.store(chosen_ptr + i_n, value)", id="chosen logit"),
    ],
)  # fmt: skip
def test_bugs_are_noticed(old: str, new: str) -> None:
    with mutated(module, old, new) as mutant, pytest.raises((KernelBug, AssertionError)):
        check(mutant, random_logits(3, 5000, torch.float32), 5)
        check(mutant, random_logits(3, 5000, torch.float32).contiguous(), 5)
        logits_NV = torch.full((2, 3000), 2.0)
        logits_NV[1, 3:] = -torch.inf
        check(mutant, logits_NV, 40)
