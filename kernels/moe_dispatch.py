"""Sorts the tokens' choices by expert and cuts each expert's share into blocks of rows.

    sorted_slots = the slots 0 … N-1 in order of (expert, slot)
    blocks[m] = (expert, first, end): its rows are sorted_slots[first:end], at most `block_rows`

T tokens   A experts per token   E experts   N = T·A slots, slot n is choice n mod A of token n // A
M blocks: an upper bound known from N, E and `block_rows`; those left over are (-1, 0, 0).
chosen_TA ints → sorted_slots_N int32, blocks_M3 int32

A counting sort in fixed order, without atomics. Up to _MAX_PROGRAMS programs share the slots:

    count  program p:  counts[p, e] = those of its slots that chose e   (left out for few slots)
    sort   program p:  place of a slot = Σ counts[:, < e] + Σ counts[< p, e] + its rank within p
                       blocks follow from the sums over all p; each program writes a part of them

Slots are taken BLOCK_N at a time, as ones in a tile [BLOCK_N, BLOCK_E], where a running sum down
the rows gives ranks.
"""

import torch
from torch import Tensor

from bezel.kernels.jit import runs_triton, tl, triton

_MAX_PROGRAMS = 64
_MAX_ALONE = 128  # slots that one program sorts faster than two launches do
_BLOCK_N = 64
_BLOCK_P = 16
_NUM_WARPS = 8


def max_blocks(num_slots: int, num_experts: int, block_rows: int) -> int:
    """Each expert that is used may lack up to `block_rows` - 1 rows in its last block."""
    used = min(num_slots, num_experts)
    return (num_slots + used * (block_rows - 1)) // block_rows


def dispatch_reference(
    chosen_TA: Tensor, num_experts: int, block_rows: int
) -> tuple[Tensor, Tensor]:
    experts_N = chosen_TA.flatten()
    counts_E = torch.bincount(experts_N, minlength=num_experts)
    ends_E = counts_E.cumsum(0)
    num_blocks_E = (counts_E + block_rows - 1) // block_rows
    expert_M = torch.repeat_interleave(num_blocks_E)
    nth_M = torch.arange(len(expert_M), device=experts_N.device)
    nth_M -= (num_blocks_E.cumsum(0) - num_blocks_E)[expert_M]
    first_M = (ends_E - counts_E)[expert_M] + nth_M * block_rows
    end_M = torch.minimum(first_M + block_rows, ends_E[expert_M])
    blocks_M3 = expert_M.new_zeros(max_blocks(len(experts_N), num_experts, block_rows), 3)
    blocks_M3[:, 0] = -1
    blocks_M3[: len(expert_M)] = torch.stack((expert_M, first_M, end_M), 1)
    return experts_N.argsort(stable=True).int(), blocks_M3.int()


@triton.jit
def _count(chosen_ptr, i_begin, i_end, o_e, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """How many of the slots [i_begin, i_end) chose each expert, [BLOCK_E]."""
    b_count = tl.zeros([BLOCK_E], tl.int32)
    for i_n in range(i_begin, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_expert = tl.load(chosen_ptr + o_n, mask=o_n < i_end, other=-1)
        b_count += tl.sum((b_expert[:, None] == o_e[None, :]).to(tl.int32), 0)
    return b_count


@triton.jit(do_not_specialize=["num_slots", "slots_per_program"])
def _count_kernel(
    chosen_ptr,
    counts_ptr,
    num_slots,
    slots_per_program,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_e = tl.arange(0, BLOCK_E)
    i_begin = i_p * slots_per_program
    i_end = tl.minimum(i_begin + slots_per_program, num_slots)
    b_count = _count(chosen_ptr, i_begin, i_end, o_e, BLOCK_N, BLOCK_E)
    tl.store(counts_ptr + i_p * BLOCK_E + o_e, b_count)


@triton.jit(
    do_not_specialize=["num_slots", "slots_per_program", "num_programs", "num_blocks", "block_rows"]
)
def _sort_kernel(
    chosen_ptr,
    counts_ptr,
    sorted_ptr,
    blocks_ptr,
    num_slots,
    slots_per_program,
    num_programs,
    num_blocks,
    block_rows,
    COUNTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_e = tl.arange(0, BLOCK_E)
    i_begin = i_p * slots_per_program
    i_end = tl.minimum(i_begin + slots_per_program, num_slots)
    b_before = tl.zeros([BLOCK_E], tl.int32)
    if COUNTED:
        b_total = tl.zeros([BLOCK_E], tl.int32)
        for i_q in range(0, num_programs, BLOCK_P):
            o_q = i_q + tl.arange(0, BLOCK_P)
            # [BLOCK_P, BLOCK_E]
            p_counts = counts_ptr + o_q[:, None] * BLOCK_E + o_e[None, :]
            b_counts = tl.load(p_counts, mask=(o_q < num_programs)[:, None], other=0)
            b_total += tl.sum(b_counts, 0)
            b_before += tl.sum(tl.where((o_q < i_p)[:, None], b_counts, 0), 0)
    else:
        b_total = _count(chosen_ptr, 0, num_slots, o_e, BLOCK_N, BLOCK_E)
    b_end = tl.cumsum(b_total, 0)
    b_first = b_end - b_total

    b_next = b_first + b_before
    for i_n in range(i_begin, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_expert = tl.load(chosen_ptr + o_n, mask=o_n < i_end, other=-1)
        # [BLOCK_N, BLOCK_E]
        b_ones = (b_expert[:, None] == o_e[None, :]).to(tl.int32)
        b_places = b_next[None, :] + tl.cumsum(b_ones, 0) - 1
        tl.store(sorted_ptr + tl.sum(b_ones * b_places, 1), o_n, mask=o_n < i_end)
        b_next += tl.sum(b_ones, 0)

    b_num = (b_total + block_rows - 1) // block_rows
    b_past = tl.cumsum(b_num, 0)
    for i_m in range(i_p * BLOCK_N, num_blocks, num_programs * BLOCK_N):
        o_m = i_m + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_E]: at most one expert owns a block
        b_nth = o_m[:, None] - (b_past - b_num)[None, :]
        m_owner = (b_nth >= 0) & (b_nth < b_num[None, :])
        b_owner = tl.sum(tl.where(m_owner, o_e[None, :] + 1, 0), 1) - 1
        b_row = tl.sum(tl.where(m_owner, b_first[None, :] + b_nth * block_rows, 0), 1)
        b_stop = tl.sum(tl.where(m_owner, b_end[None, :], 0), 1)
        m_m = o_m < num_blocks
        tl.store(blocks_ptr + o_m * 3, b_owner, mask=m_m)
        tl.store(blocks_ptr + o_m * 3 + 1, b_row, mask=m_m)
        tl.store(blocks_ptr + o_m * 3 + 2, tl.minimum(b_row + block_rows, b_stop), mask=m_m)


def dispatch(chosen_TA: Tensor, num_experts: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """sorted_slots_N and blocks_M3; nothing is read back from the device."""
    if not runs_triton(chosen_TA):
        return dispatch_reference(chosen_TA, num_experts, block_rows)
    assert chosen_TA.is_contiguous()
    num_slots = chosen_TA.numel()
    slots_per_program = _BLOCK_N * triton.cdiv(num_slots, _BLOCK_N * _MAX_PROGRAMS)
    if num_slots <= _MAX_ALONE:
        slots_per_program = _MAX_ALONE
    num_programs = triton.cdiv(num_slots, slots_per_program)
    num_blocks = max_blocks(num_slots, num_experts, block_rows)
    block_e = triton.next_power_of_2(num_experts)
    counts_PE = chosen_TA.new_empty((num_programs, block_e), dtype=torch.int32)
    sorted_slots_N = chosen_TA.new_empty(num_slots, dtype=torch.int32)
    blocks_M3 = chosen_TA.new_empty((num_blocks, 3), dtype=torch.int32)
    sizes = {"BLOCK_N": _BLOCK_N, "BLOCK_E": block_e, "num_warps": _NUM_WARPS}
    if num_programs > 1:
        _count_kernel[(num_programs,)](chosen_TA, counts_PE, num_slots, slots_per_program, **sizes)
    _sort_kernel[(num_programs,)](
        chosen_TA,
        counts_PE,
        sorted_slots_N,
        blocks_M3,
        num_slots,
        slots_per_program,
        num_programs,
        num_blocks,
        block_rows,
        COUNTED=num_programs > 1,
        BLOCK_P=_BLOCK_P,
        **sizes,
    )
    return sorted_slots_N, blocks_M3
