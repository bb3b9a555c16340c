"""`kernels/decode_attention.py` on CPUs: few queries a sequence, bound by reading keys and values.

Positions that a sequence's queries see are cut into splits of 128, however many threads there are
and whatever else is in the batch. Whichever thread is free takes the next split of a kv head. A
query's splits are then put together in their order, so that its result is always the same.
"""

import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.attention_split import (
    QUERIES,
    SPLIT,
    Call,
    attend_split,
    combine,
    extent,
    padded_rows,
    part_bytes_of,
    scratch_bytes_of,
    split_at,
)
from bezel.kernels.cpu.attention_tiles import LANE_BYTES, VALUE_BLOCK
from bezel.kernels.cpu.jit import device, kernel, runs_numba
from bezel.kernels.cpu.lanes import load_i64, store_i64, take_next
from bezel.kernels.cpu.launch import active_recording
from bezel.kernels.cpu.rows import element_of, share

FEW_POSITIONS = 256  # fewer are done before a second thread has started
LOG2_E = 1.4426950408889634


@device
def plan_splits(call):
    """Write down before each sequence how many splits precede it; positions in all, and whether
    every sequence is a single split."""
    total, positions, is_single = 0, 0, True
    for s in range(call.num_seqs):
        store_i64(call.splits + 8 * s, total)
        first, end = extent(call, s)
        count = -(-(end - first) // SPLIT)
        total += count
        positions += end - first
        is_single = is_single and count == 1
    store_i64(call.splits + 8 * call.num_seqs, total)
    return positions, is_single


@device
def work_on_splits(element, call, counter, split, part_bytes):
    """Take splits until none is left."""
    num_items = load_i64(call.splits + 8 * call.num_seqs) * call.num_kv_heads
    num_rows = call.q_len * call.group
    s = 0
    while True:
        item = take_next(counter)
        if item >= num_items:
            break
        # All splits of a sequence's kv head stand together.
        while item >= load_i64(call.splits + 8 * s + 8) * call.num_kv_heads:
            s += 1
        before = load_i64(call.splits + 8 * s)
        count = load_i64(call.splits + 8 * s + 8) - before
        g, i_split = divmod(item - before * call.num_kv_heads, count)
        first, end = extent(call, s)
        part = call.parts + item * part_bytes
        attend_split(element, call, split, s, g, first + i_split * SPLIT, end, part)
        if count == 1:
            for row in range(num_rows):
                combine(element, call, s, g, part, part_bytes, 1, row)


@device
def join_splits(element, call, first, last, part_bytes):
    """Rows of sequences that are not a single split."""
    num_rows = call.q_len * call.group
    for item in range(first, last):
        rest, row = divmod(item, num_rows)
        s, g = divmod(rest, call.num_kv_heads)
        before = load_i64(call.splits + 8 * s)
        count = load_i64(call.splits + 8 * s + 8) - before
        if count != 1:
            part = call.parts + (before * call.num_kv_heads + g * count) * part_bytes
            combine(element, call, s, g, part, part_bytes, count, row)


@device
def work_in_program(element, call, scratch, scratch_bytes, counter, part_bytes, i_thread):
    """A thread's share where threads don't wait for Python: they count with `counter`."""
    padded = padded_rows(call.q_len * call.group)
    own = scratch + LANE_BYTES + i_thread * scratch_bytes
    work_on_splits(element, call, counter, split_at(own, padded), part_bytes)


@kernel
def _attend_all(threads, element, scratch, scratch_bytes, part_bytes, *numbers):
    call = Call(*numbers)
    store_i64(scratch, 0)
    splits = scratch + LANE_BYTES
    padded = padded_rows(call.q_len * call.group)
    positions, is_single = plan_splits(call)
    num_rows = call.num_seqs * call.num_kv_heads * call.q_len * call.group
    if positions <= FEW_POSITIONS:
        work_on_splits(element, call, scratch, split_at(splits, padded), part_bytes)
        join_splits(element, call, 0, num_rows, part_bytes)
        return
    for i_thread in prange(threads):
        split = split_at(splits + i_thread * scratch_bytes, padded)
        work_on_splits(element, call, scratch, split, part_bytes)
    if not is_single:
        for i_thread in prange(threads):
            first = share(i_thread, threads, num_rows)
            join_splits(element, call, first, share(i_thread + 1, threads, num_rows), part_bytes)


def runs_decode(q_THC: Tensor, value_dim: int) -> bool:
    """Whether there is a kernel for queries and values of these widths."""
    row_bytes = q_THC.shape[2] * q_THC.itemsize
    return runs_numba(q_THC) and row_bytes % LANE_BYTES == 0 and value_dim % VALUE_BLOCK == 0


def decode_attention_cpu(
    q_THC: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    seq_lens_S: Tensor,
    scale: float,
    window: int | None,
    value_dim: int,
    q_len: int,
) -> Tensor:
    """As the wrapper's."""
    num_tokens, num_heads, width = q_THC.shape
    num_seqs, num_entries = page_table_SP.shape
    _, page_size, num_kv_heads, _ = k_cache_PBGC.shape
    stride_q, stride_h, stride_c = q_THC.stride()
    stride_page, *strides = k_cache_PBGC.stride()
    assert stride_h == width and stride_c == 1 and num_tokens == num_seqs * q_len
    assert strides == [num_kv_heads * width, width, 1]
    assert v_cache_PBGK is None or v_cache_PBGK.stride() == k_cache_PBGC.stride()
    stride_table, stride_entry = page_table_SP.stride()
    assert stride_entry == 1 or num_entries == 1
    size, group = q_THC.itemsize, num_heads // num_kv_heads
    out_THK = q_THC.new_empty(num_tokens, num_heads, value_dim)
    padded = -(-q_len * group // QUERIES) * QUERIES
    visible = num_entries * page_size if window is None else window + q_len - 1
    threads = torch.get_num_threads()
    scratch_bytes, part_bytes = scratch_bytes_of(padded), part_bytes_of(padded, value_dim)
    # A counter, one `Split` for each thread, the splits before each sequence, parts.
    splits = LANE_BYTES + threads * scratch_bytes
    parts = splits + LANE_BYTES * (num_seqs // 8 + 1)
    num_parts = num_seqs * num_kv_heads * -(-visible // SPLIT)
    scratch = torch.empty(parts + num_parts * part_bytes, dtype=torch.uint8)
    p_scratch, p_k = scratch.data_ptr(), k_cache_PBGC.data_ptr()
    numbers = (
        q_THC.data_ptr(),
        stride_q * size,
        p_k,
        p_k if v_cache_PBGK is None else v_cache_PBGK.data_ptr(),
        stride_page * size,
        page_size,
        page_table_SP.data_ptr(),
        stride_table * 8,
        num_entries,
        seq_lens_S.data_ptr(),
        out_THK.data_ptr(),
        p_scratch + splits,
        p_scratch + parts,
        num_seqs,
        num_kv_heads,
        group,
        q_len,
        width,
        value_dim,
        window or 0,
        scale * LOG2_E,
    )
    element = element_of(q_THC)
    recording = active_recording()
    if recording is None:
        _attend_all(threads, element, p_scratch, scratch_bytes, part_bytes, *numbers)
    else:
        row = (element, p_scratch, scratch_bytes, part_bytes, *numbers)
        recording.add("plan_attention", 1, row)
        recording.add("attend", threads, row)
        recording.add("join_attention", num_tokens * num_heads, row)
    return out_THK
