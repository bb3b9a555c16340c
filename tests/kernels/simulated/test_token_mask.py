"""The kernel that forbids tokens, interpreted."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched

from bezel.kernels import token_mask as module
from bezel.kernels.jit import triton_on_cpu


def check(token_mask: ModuleType, num_rows: int, vocab_size: int, rows: list[int]) -> None:
    """Masks of random words, of all ones and of all zeros; views with unused ends."""
    generator = torch.Generator().manual_seed(vocab_size + num_rows)
    num_words = -(-vocab_size // 32)
    logits_NV = torch.full((num_rows, vocab_size + 7), torch.nan)[:, :vocab_size]
    logits_NV.copy_(torch.randn(num_rows, vocab_size, generator=generator))
    mask_MW = torch.zeros(len(rows), num_words + 3, dtype=torch.int32)[:, :num_words]
    random_MW = torch.randint(-(2**31), 2**31, mask_MW.shape, generator=generator)
    mask_MW.copy_(torch.where(torch.arange(num_words) % 3 == 1, random_MW, mask_MW))
    mask_MW[:, 2::3] = -1
    rows_M = torch.tensor(rows, dtype=torch.int64)
    expected_NV = logits_NV.clone()
    module.apply_token_mask_reference(expected_NV, rows_M, mask_MW)
    with watched({"logits": logits_NV, "mask": mask_MW}) as watch, triton_on_cpu():
        token_mask.apply_token_mask(logits_NV, rows_M, mask_MW)
    assert torch.equal(logits_NV, expected_NV)
    num_forbidden = int((logits_NV == -torch.inf).sum())
    assert watch.by_name["logits"].loaded == 0
    assert watch.by_name["logits"].stored == 4 * num_forbidden
    assert watch.by_name["mask"].loaded == 4 * num_words * sum(row >= 0 for row in rows)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_rows_of_any_vocabulary(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 5))
    vocab_size = data.draw(st.sampled_from([1, 31, 32, 33, 300, 2047, 2048, 2049, 5000]))
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), unique=True))
    padding = data.draw(st.integers(0, 2))
    check(module, num_rows, vocab_size, rows + [-1] * padding)


def test_the_real_vocabulary() -> None:
    check(module, 2, 262_144, [1])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("& (i_n >= 0)", "", id="padding read"),
        pytest.param("other=-1", "other=0", id="padding written"),
        pytest.param("& (o_v < V)", "", id="past the vocabulary"),
        pytest.param("(o_w < W)", "(o_w <= W)", id="one word too many"),
        pytest.param("i_n * stride_logits_n", "i_m * stride_logits_n", id="wrong row"),
        pytest.param("i_n * stride_logits_n", "i_n * V", id="row stride"),
        pytest.param("i_m * stride_mask_m", "i_m * W", id="mask stride"),
        pytest.param("& 1) == 0", "& 1) == 1", id="the allowed forbidden"),
        pytest.param(">> o_bit[None, :]", ">> (31 - o_bit[None, :])", id="bits from the top"),
        pytest.param("tl.program_id(1) * BLOCK_W", "tl.program_id(1) * 32", id="blocks overlap"),
        pytest.param("* 32 + o_bit", "* 16 + o_bit", id="half a word to a word"),
        pytest.param("b_word[:, None] >>", "-1 - b_word[:, None] >>", id="inverted words"),
    ],
)  # fmt: skip
def test_bugs_are_noticed(old: str, new: str) -> None:
    with mutated(module, old, new) as mutant, pytest.raises((KernelBug, AssertionError)):
        check(mutant, 4, 2500, [2, -1, 0])
