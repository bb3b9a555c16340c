"""`kernels/qkv.py` and `write_kv` on CPUs: one thread takes all heads of a token.

Widths and strides of heads, rows and pages are in bytes here, what is turned or normed in values.
"""

from typing import TYPE_CHECKING

import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import F32, LANES, load, load_i64, splat, store
from bezel.kernels.cpu.launch import Operation, launch
from bezel.kernels.cpu.rows import (
    FEW_VALUES,
    element_of,
    inverse_rms,
    num_bytes,
    serial,
    share,
)

if TYPE_CHECKING:
    from bezel.kernels.qkv import QKVShape


@device
def _slot_address(slot, cache, stride_page, stride_token, page_size):
    return cache + slot // page_size * stride_page + slot % page_size * stride_token


@device
def _scale_head(element, x, scale, weight, y, start, width):
    """y = x · scale · weight from value `start` on; without a weight its address is 0."""
    size = num_bytes(element)
    for j in range(start, width, LANES):
        scaled = load(element, x + j * size) * scale
        if weight != 0:
            scaled = scaled * load(F32, weight + j * 4)
        store(element, y + j * size, scaled)


@device
def _turn_pairs(element, x, half, scale, weight, cos, sin, num_pairs, y, distance):
    """The turned pairs of x · scale · weight: first values at y, second ones `distance` behind."""
    size = num_bytes(element)
    for j in range(0, num_pairs, LANES):
        first = load(element, x + j * size) * scale * load(F32, weight + j * 4)
        second = load(element, x + (half + j) * size) * scale * load(F32, weight + (half + j) * 4)
        c, s = load(F32, cos + j * 4), load(F32, sin + j * 4)
        store(element, y + j * size, first * c - second * s)
        store(element, y + (distance + j) * size, second * c + first * s)


@device
def _turn_head(element, x, half, eps, weight, cos, sin, num_pairs, y):
    """RoPE(rms(x) · weight): pairs from `num_pairs` on are normed only."""
    scale = splat(inverse_rms(element, x, 2 * half, eps))
    _turn_pairs(element, x, half, scale, weight, cos, sin, num_pairs, y, half)
    _scale_head(element, x, scale, weight, y, num_pairs, half)
    _scale_head(element, x, scale, weight, y, half + num_pairs, 2 * half)


@device
def _pack_query(element, x, half, eps, weight, k_weight, cos, sin, num_pairs, y):
    """Normed and times w_k where no pair is turned, zero where one is, and turned pairs behind."""
    size, zeros = num_bytes(element), splat(0.0)
    scale = splat(inverse_rms(element, x, 2 * half, eps))
    for j in range(0, 2 * half, LANES):
        if j % half < num_pairs:
            store(element, y + j * size, zeros)
        else:
            normed = load(element, x + j * size) * scale * load(F32, weight + j * 4)
            store(element, y + j * size, normed * load(F32, k_weight + j * 4))
    y_turned = y + 2 * half * size
    _turn_pairs(element, x, half, scale, weight, cos, sin, num_pairs, y_turned, num_pairs)


@device
def _pack_key(element, x, half, eps, weight, cos, sin, num_pairs, y):
    """The normed value, and turned pairs of the key behind."""
    scale = splat(inverse_rms(element, x, 2 * half, eps))
    _scale_head(element, x, scale, 0, y, 0, 2 * half)
    y_turned = y + 2 * half * num_bytes(element)
    _turn_pairs(element, x, half, scale, weight, cos, sin, num_pairs, y_turned, num_pairs)


@serial
def qkv_rows(
    first,
    last,
    qkv,
    stride_x,
    heads,
    kv_heads,
    half,
    num_pairs,
    eps,
    q_weight,
    k_weight,
    cos,
    sin,
    slots,
    num_stored,
    q,
    k,
    v,
    k_cache,
    v_cache,
    stride_page,
    page_size,
    owns_kv,
    key_is_value,
    has_value_norm,
    element,
):
    size = num_bytes(element)
    head = 2 * half * size
    width = head + 2 * num_pairs * size if key_is_value else head
    for t in range(first, last):
        x, c, s = qkv + t * stride_x, cos + t * num_pairs * 4, sin + t * num_pairs * 4
        for h in range(heads):
            y = q + (t * heads + h) * width
            if key_is_value:
                _pack_query(element, x, half, eps, q_weight, k_weight, c, s, num_pairs, y)
            else:
                _turn_head(element, x, half, eps, q_weight, c, s, num_pairs, y)
            x += head
        if not owns_kv:
            continue
        row = kv_heads * width
        if t < num_stored:
            slot = load_i64(slots + t * 8)
            if slot < 0:
                continue
            y_k = _slot_address(slot, k_cache, stride_page, row, page_size)
            y_v = _slot_address(slot, v_cache, stride_page, row, page_size)
        else:
            y_k, y_v = k + (t - num_stored) * row, v + (t - num_stored) * row
        for g in range(kv_heads):
            if key_is_value:
                _pack_key(element, x, half, eps, k_weight, c, s, num_pairs, y_k + g * width)
                x += head
                continue
            _turn_head(element, x, half, eps, k_weight, c, s, num_pairs, y_k + g * width)
            x_v, scale = x + kv_heads * head, splat(1.0)
            if has_value_norm:
                scale = splat(inverse_rms(element, x_v, 2 * half, eps))
            _scale_head(element, x_v, scale, 0, y_v + g * width, 0, 2 * half)
            x += head


@kernel
def _qkv_all(threads, num_rows, *row):
    for i in prange(threads):
        qkv_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *row)


@serial
def _write_rows(
    first, last, values, stride_v, slots, cache, stride_page, page_size, width, element
):
    size = num_bytes(element)
    for t in range(first, last):
        slot = load_i64(slots + t * 8)
        if slot >= 0:
            y = _slot_address(slot, cache, stride_page, width * size, page_size)
            _scale_head(element, values + t * stride_v, splat(1.0), 0, y, 0, width)


@kernel
def _write_all(threads, num_rows, *row):
    for i in prange(threads):
        _write_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *row)


_QKV = Operation("qkv", qkv_rows, _qkv_all)
_WRITE = Operation("write", _write_rows, _write_all)


def rotate_and_store(
    qkv_TNK: Tensor,
    shape: "QKVShape",
    eps: float,
    q_weight_K: Tensor,
    k_weight_K: Tensor | None,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
    k_cache_PBGC: Tensor | None,
    v_cache_PBGK: Tensor | None,
    slot_mapping_T: Tensor,
    num_stored: int,
    owns_kv: bool,
    returns_new: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q_THC and, of tokens from `num_stored` on, k_TGK and v_TGK: both wrappers' results.

    K/2 and J are multiples of 16.
    """
    num_tokens, num_rows, head_dim = qkv_TNK.shape
    stride_x, stride_n, stride_k = qkv_TNK.stride()
    num_pairs, size = cos_TJ.shape[1], qkv_TNK.itemsize
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    assert stride_n == head_dim and stride_k == 1 and q_weight_K.dtype is torch.float32
    assert cos_TJ.is_contiguous() and sin_TJ.is_contiguous()
    width = head_dim + 2 * num_pairs if shape.key_is_value else head_dim
    q_THC, k_TGK, v_TGK = qkv_TNK.new_empty(num_tokens, heads, width), None, None
    p_k, p_v, p_k_cache, p_v_cache, stride_page, page_size = 0, 0, 0, 0, 0, 1
    if owns_kv:
        assert num_rows == heads + (1 if shape.key_is_value else 2) * kv_heads
        assert k_cache_PBGC is not None and k_cache_PBGC.dtype is qkv_TNK.dtype
        strides = k_cache_PBGC.stride()
        assert strides[1:] == (kv_heads * width, width, 1)
        stride_page, page_size = strides[0], k_cache_PBGC.shape[1]
        p_k_cache = k_cache_PBGC.data_ptr()
        if v_cache_PBGK is not None:
            assert v_cache_PBGK.stride() == strides
            p_v_cache = v_cache_PBGK.data_ptr()
        if returns_new:
            num_new = num_tokens - num_stored
            # Where nothing is new, one tensor without values does for both.
            k_TGK = qkv_TNK.new_empty(num_new, kv_heads, head_dim)
            v_TGK = torch.empty_like(k_TGK) if num_new > 0 else k_TGK
            p_k, p_v = k_TGK.data_ptr(), v_TGK.data_ptr()
    row = (
        qkv_TNK.data_ptr(),
        stride_x * size,
        heads,
        kv_heads,
        head_dim // 2,
        num_pairs,
        eps,
        q_weight_K.data_ptr(),
        0 if k_weight_K is None else k_weight_K.data_ptr(),
        cos_TJ.data_ptr(),
        sin_TJ.data_ptr(),
        slot_mapping_T.data_ptr(),
        num_stored,
        q_THC.data_ptr(),
        p_k,
        p_v,
        p_k_cache,
        p_v_cache,
        stride_page * size,
        page_size,
        owns_kv,
        shape.key_is_value,
        shape.has_value_norm,
        element_of(qkv_TNK),
    )
    launch(_QKV, num_tokens, num_tokens * num_rows * head_dim <= FEW_VALUES, row)
    return q_THC, k_TGK, v_TGK


def write_kv(values_TGK: Tensor, cache_PBGK: Tensor, slot_mapping_T: Tensor) -> None:
    """As the wrapper's; G·K is a multiple of 16."""
    num_tokens, kv_heads, head_dim = values_TGK.shape
    strides_v, strides = values_TGK.stride(), cache_PBGK.stride()
    width, size = kv_heads * head_dim, values_TGK.itemsize
    assert cache_PBGK.dtype is values_TGK.dtype and cache_PBGK.shape[2:] == values_TGK.shape[1:]
    assert strides_v[1:] == (head_dim, 1), "a token's values must be contiguous"
    assert strides[1:] == (width, head_dim, 1), "tokens of a page must be contiguous"
    row = (
        values_TGK.data_ptr(),
        strides_v[0] * size,
        slot_mapping_T.data_ptr(),
        cache_PBGK.data_ptr(),
        strides[0] * size,
        cache_PBGK.shape[1],
        width,
        element_of(values_TGK),
    )
    launch(_WRITE, num_tokens, num_tokens * width <= FEW_VALUES, row)
