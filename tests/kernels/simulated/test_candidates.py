"""Lists of candidates, interpreted: whole, or known to be of no use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.watch import watched
from torch import Tensor

from bezel.kernels import candidates
from bezel.kernels.candidates import Candidates, gather_candidates
from bezel.kernels.jit import triton_on_cpu


def gathered(logits_SV: Tensor, rows: list[int], top_k: list[int]) -> Candidates:
    with watched(), triton_on_cpu():
        return gather_candidates(logits_SV, torch.tensor(rows), torch.tensor(top_k))


def listed(found: Candidates, n: int) -> list[tuple[float, int]]:
    """(−logit, token id) of a list that has room for all."""
    slots = found.values_NS.shape[1] // found.counts_NB.shape[1]
    pairs = []
    for block, count in enumerate(found.counts_NB[n].tolist()):
        assert count <= slots
        for slot in range(block * slots, block * slots + count):
            pairs.append((-found.values_NS[n, slot].item(), int(found.tokens_NS[n, slot])))
    return sorted(pairs)


def in_rank_order(logits_V: Tensor) -> list[tuple[float, int]]:
    return sorted(zip((-logits_V.float()).tolist(), range(len(logits_V)), strict=True))


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([600, 999, 2048, 5000]), st.data())
def test_a_list_holds_the_largest_and_little_more(vocab_size: int, data: st.DataObject) -> None:
    """No more than all that are not below the k-th largest maximum of a column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "NUM_COLUMNS", 512)
        rows = data.draw(st.permutations([0, 1, 2]))[:2]
        top_k = data.draw(st.lists(st.integers(1, 100), min_size=3, max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
        logits_SV = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(7)).to(dtype)
        logits_SV[:, 5] = torch.nan
        found = gathered(logits_SV, rows, top_k)
    logits_SV[:, 5] = -torch.inf
    for n, row in enumerate(rows):
        expected = in_rank_order(logits_SV[row])
        pairs = listed(found, n)
        assert pairs == expected[: len(pairs)] and len(pairs) >= top_k[row]
        columns = min(512, vocab_size)
        padded = torch.nn.functional.pad(
            logits_SV[row].float(), (0, -vocab_size % columns), value=-9
        )
        floor = padded.view(-1, columns).amax(0).sort(descending=True).values[top_k[row] - 1]
        assert pairs[-1][0] == -floor


def test_counts_go_beyond_the_slots_where_equal_logits_overflow() -> None:
    found = gathered(torch.ones(1, 20_000), [0], [3])
    assert found.counts_NB.sum() == 20_000
    assert found.counts_NB.max() > candidates.SLOTS


def test_logits_of_minus_infinity_are_not_listed() -> None:
    logits_SV = torch.full((1, 20_000), -torch.inf)
    logits_SV[0, [8, 8200, 19_999]] = torch.tensor([2.0, -1.0, 2.0])
    assert listed(gathered(logits_SV, [0], [64]), 0) == [(-2.0, 8), (-2.0, 19_999), (1.0, 8200)]


def test_no_rows_launch_nothing() -> None:
    with watched() as watch, triton_on_cpu():
        gather_candidates(torch.ones(2, 300), torch.empty(0, dtype=torch.int64), torch.ones(2))
    assert watch.num_launches == 0
