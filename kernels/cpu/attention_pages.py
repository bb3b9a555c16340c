"""Where the keys and values of positions stand: in pages, and a chunk's own beside them.

Kernels don't copy rows together. They list the rows' addresses, 16 bytes a position, and read the
rows where they are.
"""

from typing import NamedTuple

from bezel.kernels.cpu.jit import device
from bezel.kernels.cpu.lanes import load_i64, store_i64


class Rows(NamedTuple):
    """Rows of one sequence and kv head: addresses, and distances in bytes.

    Positions from `fresh_start` on stand at `fresh_k` and `fresh_v`, one row after the other; those
    before it in pages, whose table wraps around after `num_entries`.
    """

    k_cache: int
    v_cache: int
    stride_page: int
    stride_token: int
    page_size: int
    table: int
    num_entries: int
    fresh_start: int
    fresh_k: int
    fresh_v: int
    fresh_stride_k: int
    fresh_stride_v: int


@device
def list_rows(rows, first, count, stop, k_list, v_list):
    """Addresses of `count` positions from `first` on. What would be at `stop` or later, where
    nothing has been stored yet, is the last row before it again."""
    i = 0
    in_pages = min(count, min(stop, rows.fresh_start) - first)
    while i < in_pages:
        page, offset = divmod(first + i, rows.page_size)
        place = load_i64(rows.table + 8 * (page % rows.num_entries)) * rows.stride_page
        place += offset * rows.stride_token
        end = min(in_pages, i + rows.page_size - offset)
        while i < end:
            store_i64(k_list + 8 * i, rows.k_cache + place)
            store_i64(v_list + 8 * i, rows.v_cache + place)
            place += rows.stride_token
            i += 1
    end = min(count, stop - first)
    while i < end:
        row = first + i - rows.fresh_start
        store_i64(k_list + 8 * i, rows.fresh_k + row * rows.fresh_stride_k)
        store_i64(v_list + 8 * i, rows.fresh_v + row * rows.fresh_stride_v)
        i += 1
    while i < count:
        store_i64(k_list + 8 * i, load_i64(k_list + 8 * i - 8))
        store_i64(v_list + 8 * i, load_i64(v_list + 8 * i - 8))
        i += 1
