"""Slots sorted by expert and cut into blocks, against lists."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bezel.kernels.moe_dispatch import dispatch, max_blocks


def naive_dispatch(
    experts: list[int], num_experts: int, block_rows: int
) -> tuple[list[int], list[tuple[int, int, int]]]:
    order: list[int] = []
    blocks = []
    for expert in range(num_experts):
        slots = [n for n, chosen in enumerate(experts) if chosen == expert]
        for first in range(0, len(slots), block_rows):
            part = slots[first : first + block_rows]
            blocks.append((expert, len(order), len(order) + len(part)))
            order += part
    return order, blocks


@given(
    st.integers(1, 9).flatmap(
        lambda num_experts: st.tuples(
            st.just(num_experts),
            st.integers(1, 4),
            st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=40),
        )
    ),
    st.sampled_from([1, 2, 16]),
)
def test_every_slot_once_by_expert_in_order(
    drawn: tuple[int, int, list[int]], block_rows: int
) -> None:
    num_experts, top_k, experts = drawn
    experts = (experts * top_k)[: len(experts) // top_k * top_k or top_k]
    chosen_TA = torch.tensor(experts, dtype=torch.int32).view(-1, top_k)
    order, blocks = naive_dispatch(experts, num_experts, block_rows)
    sorted_slots_N, blocks_M3 = dispatch(chosen_TA, num_experts, block_rows)
    assert (sorted_slots_N.dtype, blocks_M3.dtype) == (torch.int32, torch.int32)
    assert sorted_slots_N.tolist() == order
    unused = max_blocks(len(experts), num_experts, block_rows) - len(blocks)
    assert [tuple(block) for block in blocks_M3.tolist()] == blocks + [(-1, 0, 0)] * unused


def test_bound_on_blocks_is_reached() -> None:
    """The worst case: all experts but the first have one slot more than full blocks."""
    chosen_TA = torch.tensor([0] * 4 + [1] * 5 + [2] * 1)[:, None]
    _, blocks_M3 = dispatch(chosen_TA, 3, 4)
    assert (blocks_M3[:, 0] >= 0).all() and len(blocks_M3) == 4
    assert max_blocks(64, 128, 16) == 64
    assert max_blocks(65_536, 128, 128) == 512 + 127
