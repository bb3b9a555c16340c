"""`combine_experts` and `route` on CPUs: what stands on both sides of the experts' products."""

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import (
    F32,
    LANES,
    load,
    load_i32,
    load_scalar,
    splat,
    store,
    store_f32,
    store_i32,
)
from bezel.kernels.cpu.launch import Operation, launch
from bezel.kernels.cpu.norms import norm_row
from bezel.kernels.cpu.rows import FEW_VALUES, element_of, inverse_rms, num_bytes, serial, share

_NUM_SUMS = 3  # float32 rows between the passes over a token: routed, dense, mixed
_FEW_SCORES = 1 << 11


@device
def _sum_rows(element, y, weights, num_rows, given, routed, dense, width, top_k):
    """routed = Σ w · y over the first `top_k` rows; dense is given or the sum of the others."""
    size = num_bytes(element)
    for d in range(0, width, LANES):
        total = splat(0.0)
        for j in range(top_k):
            weight = splat(load_scalar(F32, weights + j * 4))
            total = total + weight * load(element, y + (j * width + d) * size)
        store(F32, routed + d * 4, total)
        total = splat(0.0)
        if given != 0:
            total = load(element, given + d * size)
        for j in range(top_k, num_rows):
            total = total + load(element, y + (j * width + d) * size)
        store(F32, dense + d * 4, total)


@serial
def combine_rows(
    first,
    last,
    i_thread,
    y,
    num_rows,
    top_k,
    weights,
    dense,
    stride_d,
    routed_norm,
    dense_norm,
    post_norm,
    residual,
    stride_r,
    scalar,
    next_weight,
    sums,
    out,
    next_out,
    width,
    eps,
    element,
):
    size = num_bytes(element)
    routed = sums + i_thread * _NUM_SUMS * width * 4
    summed, mixed = routed + width * 4, routed + 2 * width * 4
    for t in range(first, last):
        given = dense + t * stride_d if dense != 0 else 0
        p_weights, p_y = weights + t * top_k * 4, y + t * num_rows * width * size
        p_r, p_out = residual + t * stride_r, out + t * width * size
        _sum_rows(element, p_y, p_weights, num_rows, given, routed, summed, width, top_k)
        scale = splat(inverse_rms(F32, routed, width, eps))
        scale_dense = splat(inverse_rms(F32, summed, width, eps))
        for d in range(0, width * 4, LANES * 4):
            of_dense = load(F32, summed + d) * scale_dense * load(F32, dense_norm + d)
            of_routed = load(F32, routed + d) * scale * load(F32, routed_norm + d)
            store(F32, mixed + d, of_dense + of_routed)
        scale = splat(inverse_rms(F32, mixed, width, eps))
        for d in range(0, width, LANES):
            added = load(F32, mixed + d * 4) * scale * load(F32, post_norm + d * 4)
            store(
                element, p_out + d * size, (load(element, p_r + d * size) + added) * splat(scalar)
            )
        if next_weight != 0:
            norm_row(element, p_out, next_weight, next_out + t * width * size, width, eps)


@serial
def _combine_alone(first, last, *row):
    combine_rows(first, last, 0, *row)


@kernel
def _combine_all(threads, num_rows, *row):
    for i in prange(threads):
        combine_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), i, *row)


@device
def _insert(score, expert, chosen, scores, place):
    """Into a list that is sorted, behind all scores as high; what was at `place` is overwritten."""
    while place > 0 and score > load_scalar(F32, scores + (place - 1) * 4):
        store_i32(chosen + place * 4, load_i32(chosen + (place - 1) * 4))
        store_f32(scores + place * 4, load_scalar(F32, scores + (place - 1) * 4))
        place -= 1
    store_i32(chosen + place * 4, expert)
    store_f32(scores + place * 4, score)


@serial
def route_rows(
    first, last, scores, stride_s, num_experts, scale, chosen, weights, top_k, element, of_scale
):
    for t in range(first, last):
        p_chosen, p_weights = chosen + t * top_k * 4, weights + t * top_k * 4
        for e in range(num_experts):
            score = load_scalar(element, scores + t * stride_s + e * num_bytes(element))
            if score != score:
                score = np.float32(-math.inf)
            if e < top_k:
                _insert(score, e, p_chosen, p_weights, e)
            elif score > load_scalar(F32, p_weights + (top_k - 1) * 4):
                _insert(score, e, p_chosen, p_weights, top_k - 1)
        best, total = load_scalar(F32, p_weights), 0.0
        for j in range(top_k):
            power = math.exp(load_scalar(F32, p_weights + j * 4) - best)
            store_f32(p_weights + j * 4, power)
            total += power
        for j in range(top_k):
            factor = load_scalar(of_scale, scale + load_i32(p_chosen + j * 4) * num_bytes(of_scale))
            store_f32(p_weights + j * 4, load_scalar(F32, p_weights + j * 4) / total * factor)


@kernel
def _route_all(threads, num_rows, *row):
    for i in prange(threads):
        route_rows(share(i, threads, num_rows), share(i + 1, threads, num_rows), *row)


_ROUTE = Operation("route", route_rows, _route_all)
_COMBINE = Operation("combine", _combine_alone, _combine_all)


def route(scores_TE: Tensor, per_expert_scale_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As the wrapper's."""
    num_tokens, num_experts = scores_TE.shape
    stride, stride_e = scores_TE.stride()
    assert stride_e == 1 and top_k <= num_experts
    chosen_TA = scores_TE.new_empty((num_tokens, top_k), dtype=torch.int32)
    weights_TA = scores_TE.new_empty((num_tokens, top_k), dtype=torch.float32)
    row = (
        scores_TE.data_ptr(),
        stride * scores_TE.itemsize,
        num_experts,
        per_expert_scale_E.data_ptr(),
        chosen_TA.data_ptr(),
        weights_TA.data_ptr(),
        top_k,
        element_of(scores_TE),
        element_of(per_expert_scale_E),
    )
    launch(_ROUTE, num_tokens, num_tokens * num_experts <= _FEW_SCORES, row)
    return chosen_TA, weights_TA


def combine_experts(
    y_TXD: Tensor,
    weights_TA: Tensor,
    dense_TD: Tensor | None,
    routed_norm_D: Tensor,
    dense_norm_D: Tensor,
    post_norm_D: Tensor,
    residual_TD: Tensor,
    eps: float,
    scalar_1: Tensor | None,
    next_weight_D: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """As the wrapper's; D is a multiple of 16."""
    num_tokens, num_rows, width = y_TXD.shape
    stride_r, stride_rd = residual_TD.stride()
    size = y_TXD.itemsize
    assert y_TXD.is_contiguous() and weights_TA.is_contiguous() and stride_rd == 1
    assert residual_TD.dtype is y_TXD.dtype and weights_TA.dtype is torch.float32
    stride_d = 0
    if dense_TD is not None:
        stride_d, stride_dd = dense_TD.stride()
        assert stride_dd == 1 and dense_TD.dtype is y_TXD.dtype
    out_TD = torch.empty_like(residual_TD)
    next_TD = None if next_weight_D is None else torch.empty_like(residual_TD)
    sums = weights_TA.new_empty(torch.get_num_threads(), _NUM_SUMS, width)
    row = (
        y_TXD.data_ptr(),
        num_rows,
        weights_TA.shape[1],
        weights_TA.data_ptr(),
        0 if dense_TD is None else dense_TD.data_ptr(),
        stride_d * size,
        routed_norm_D.data_ptr(),
        dense_norm_D.data_ptr(),
        post_norm_D.data_ptr(),
        residual_TD.data_ptr(),
        stride_r * size,
        1.0 if scalar_1 is None else scalar_1.item(),
        0 if next_weight_D is None else next_weight_D.data_ptr(),
        sums.data_ptr(),
        out_TD.data_ptr(),
        0 if next_TD is None else next_TD.data_ptr(),
        width,
        eps,
        element_of(y_TXD),
    )
    launch(_COMBINE, num_tokens, num_tokens * num_rows * width <= FEW_VALUES, row)
    return out_TD, next_TD
