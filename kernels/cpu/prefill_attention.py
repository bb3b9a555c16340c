"""`kernels/prefill_attention.py` on CPUs: chunks in blocks of rows, by whichever thread is free.

Keys that no row of a block sees are not read; the others once for all query heads that share them.
The order of a row's sums depends on its own chunk alone.
"""

from typing import NamedTuple

import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.attention_block import ROWS, Chunk, attend_block, block_at, scratch_bytes_of
from bezel.kernels.cpu.attention_pages import Rows
from bezel.kernels.cpu.attention_tiles import LANE_BYTES, VALUE_BLOCK, WORD_BYTES
from bezel.kernels.cpu.jit import device, kernel, runs_numba
from bezel.kernels.cpu.lanes import load_i64, store_i64, take_next
from bezel.kernels.cpu.rows import element_of, num_bytes

LOG2_E = 1.4426950408889634


class _Call(NamedTuple):
    """Addresses, distances in bytes and numbers that all blocks share; 0 where there is none."""

    q: int
    stride_q: int
    k: int
    stride_k: int
    v: int
    stride_v: int
    k_cache: int
    v_cache: int
    stride_page: int
    page_size: int
    table: int
    stride_table: int
    num_entries: int
    offsets: int
    seq_lens: int
    last_keys: int
    out: int
    num_seqs: int
    num_kv_heads: int
    group: int
    width: int
    value_dim: int
    max_q_len: int
    window: int
    factor: float


@device
def _rows(call, s, g, row, start, end, row_bytes):
    """Keys and values of kv head `g`; those of local chunks begin at row `row` of `k` and `v`."""
    return Rows(
        call.k_cache + g * row_bytes,
        call.v_cache + g * row_bytes,
        call.stride_page,
        call.num_kv_heads * row_bytes,
        call.page_size,
        call.table + s * call.stride_table,
        call.num_entries,
        start if call.k != 0 else end,
        call.k + row * call.stride_k + g * row_bytes,
        call.v + row * call.stride_v + g * row_bytes,
        call.stride_k,
        call.stride_v,
    )


@device
def _chunk(call, g, row, start, num_tokens, size):
    """Queries of kv head `g` from row `row` on."""
    num_heads, out_bytes = call.num_kv_heads * call.group, call.value_dim * size
    return Chunk(
        call.q + row * call.stride_q + g * call.group * call.width * size,
        call.stride_q,
        call.width * size,
        call.out + (row * num_heads + g * call.group) * out_bytes,
        num_heads * out_bytes,
        out_bytes,
        start,
        num_tokens,
        call.group,
        call.window,
        call.last_keys + 8 * row if call.last_keys != 0 else 0,
    )


@device
def _work(element, call, counter, block):
    """Take blocks until none is left, last ones first: those of global layers have most keys."""
    size = num_bytes(element)
    row_bytes = call.width * size
    tokens = ROWS // call.group
    num_blocks = -(-call.max_q_len // tokens)
    while True:
        item = take_next(counter)
        if item >= num_blocks * call.num_kv_heads * call.num_seqs:
            break
        rest, g = divmod(item, call.num_kv_heads)
        i_block, s = divmod(rest, call.num_seqs)
        token = (num_blocks - 1 - i_block) * tokens
        row = load_i64(call.offsets + 8 * s)
        num_tokens = load_i64(call.offsets + 8 * s + 8) - row
        if token < num_tokens:
            end = load_i64(call.seq_lens + 8 * s)
            rows = _rows(call, s, g, row, end - num_tokens, end, row_bytes)
            chunk = _chunk(call, g, row, end - num_tokens, num_tokens, size)
            num_rows = min(tokens, num_tokens - token) * call.group
            num_words = row_bytes // WORD_BYTES
            shape = (num_rows, num_words, call.value_dim)
            attend_block(element, block, rows, chunk, token, *shape, call.factor)


@kernel
def _attend_all(threads, element, scratch, scratch_bytes, *numbers):
    call = _Call(*numbers)
    num_words = call.width * num_bytes(element) // WORD_BYTES
    store_i64(scratch, 0)
    for i_thread in prange(threads):
        block = block_at(scratch + LANE_BYTES + i_thread * scratch_bytes, num_words)
        _work(element, call, scratch, block)


def runs_prefill(q_THC: Tensor, value_dim: int) -> bool:
    """Whether there is a kernel for queries and values of these widths."""
    return runs_numba(q_THC, q_THC.shape[2]) and value_dim % VALUE_BLOCK == 0


def prefill_attention_cpu(
    q_THC: Tensor,
    k_TGC: Tensor | None,
    v_TGK: Tensor | None,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    page_table_SP: Tensor,
    cu_seqlens_q_S1: Tensor,
    seq_lens_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int | None,
    value_dim: int,
    last_key_T: Tensor | None = None,
) -> Tensor:
    """As the wrappers': without `k_TGC` and `v_TGK` the chunk's own are in pages, too."""
    num_tokens, num_heads, width = q_THC.shape
    page_size, num_kv_heads = k_cache_PBGC.shape[1:3]
    group, size = num_heads // num_kv_heads, q_THC.itemsize
    assert group <= ROWS
    assert k_cache_PBGC.stride()[1:] == (num_kv_heads * width, width, 1)
    assert v_cache_PBGK is None or v_cache_PBGK.stride() == k_cache_PBGC.stride()
    for x in (q_THC, k_TGC, v_TGK):
        assert x is None or x.stride()[1:] == (width, 1), "a token's heads must be contiguous"
    assert page_table_SP.stride(1) == 1
    out_THK = q_THC.new_empty(num_tokens, num_heads, value_dim)
    threads = torch.get_num_threads()
    scratch_bytes = scratch_bytes_of(width * size, value_dim)
    scratch = torch.empty(LANE_BYTES + threads * scratch_bytes, dtype=torch.uint8)
    v_cache = k_cache_PBGC if v_cache_PBGK is None else v_cache_PBGK
    _attend_all(
        threads,
        element_of(q_THC),
        scratch.data_ptr(),
        scratch_bytes,
        *_start(q_THC),
        *_start(k_TGC),
        *_start(v_TGK),
        k_cache_PBGC.data_ptr(),
        v_cache.data_ptr(),
        k_cache_PBGC.stride(0) * size,
        page_size,
        *_start(page_table_SP),
        page_table_SP.shape[1],
        cu_seqlens_q_S1.data_ptr(),
        seq_lens_S.data_ptr(),
        0 if last_key_T is None else last_key_T.data_ptr(),
        out_THK.data_ptr(),
        len(seq_lens_S),
        num_kv_heads,
        group,
        width,
        value_dim,
        max_q_len,
        window or 0,
        scale * LOG2_E,
    )
    return out_THK


def _start(x: Tensor | None) -> tuple[int, int]:
    """Address of a tensor's first row, and bytes to the next."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0) * x.itemsize)
