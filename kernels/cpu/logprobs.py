"""`kernels.logprobs` on CPUs: a row is read twice, once for maxima and once for the sum.

Every chunk sums against its own maximum, in float32 by lanes; chunks are joined in their order, in
float64. The likeliest tokens are listed as for top_k, and put in order.
"""

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor

from bezel.kernels.cpu.candidates import (
    CHUNK_BLOCKS,
    Rows,
    find_maxima,
    key_token,
    key_value,
    list_largest,
    num_blocks_of,
    num_chunks_of,
)
from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import LANES, exp2, lane_sum, load, load_scalar, maximum, splat

_LOG2_E = np.float32(math.log2(math.e))


@device
def _largest_of(maxima, first, end):
    largest = np.float32(-np.inf)
    for i in range(first, end):
        largest = max(largest, maxima[i])
    return largest


@kernel
def _sum_chunks(element, size, logits, stride, num_vectors, maxima, peaks, sums, threads):
    """Maximum m and Σ e^(x − m) of each chunk: float32 and float64, N×chunks."""
    num_chunks, num_blocks = num_chunks_of(num_vectors), num_blocks_of(num_vectors)
    for i_thread in prange(threads):
        num_tasks = len(maxima) * num_chunks
        for task in range(i_thread * num_tasks // threads, (i_thread + 1) * num_tasks // threads):
            n, chunk = task // num_chunks, task % num_chunks
            first, end = chunk * CHUNK_BLOCKS, min((chunk + 1) * CHUNK_BLOCKS, num_blocks)
            columns = num_blocks * LANES
            peak = _largest_of(maxima[n], columns + first, columns + end)
            total = splat(0.0)
            for i in range(first * LANES, min(end * LANES, num_vectors)):
                x = load(element, logits + n * stride + i * LANES * size)
                exponent = (x - splat(peak)) * splat(_LOG2_E)
                total = total + exp2(maximum(exponent, splat(-np.inf)))
            peaks[n, chunk], sums[n, chunk] = peak, np.float64(lane_sum(total))


@kernel
def _finish_rows(
    element,
    size,
    logits,
    stride,
    num_vectors,
    maxima,
    peaks,
    sums,
    lists,
    token_ids,
    chosen,
    top_values,
    top_ids,
    threads,
):
    """`lists` has room for a row of keys for each thread."""
    for i_thread in prange(threads):
        num_rows, num_top = top_ids.shape
        for n in range(i_thread * num_rows // threads, (i_thread + 1) * num_rows // threads):
            row, keys = logits + n * stride, lists[i_thread]
            log_sum = _log_sum(peaks[n], sums[n])
            chosen[n] = load_scalar(element, row + token_ids[n] * size) - log_sum
            if num_top == 0:
                continue
            num_keys = list_largest(element, size, row, num_vectors, maxima[n], num_top, keys)
            _sort(keys, num_keys)
            for i in range(num_keys):
                top_values[n, i] = key_value(keys[i]) - log_sum
                top_ids[n, i] = key_token(keys[i])
            _fill_up(element, size, row, top_values[n], top_ids[n], num_keys)


@device
def _log_sum(peaks, sums):
    peak, total = _largest_of(peaks, 0, len(peaks)), 0.0
    for chunk in range(len(peaks)):
        if peaks[chunk] > -np.inf:
            total += sums[chunk] * math.exp(np.float64(peaks[chunk] - peak))
    return peak + math.log(total)


@device
def _sort(keys, num_keys):
    """Falling; there are few."""
    for end in range(1, num_keys):
        key, i = keys[end], end
        while i > 0 and keys[i - 1] < key:
            keys[i] = keys[i - 1]
            i -= 1
        keys[i] = key


@device
def _fill_up(element, size, row, values, token_ids, num_found):
    """With the first tokens of −∞, where others are too few."""
    token = 0
    while num_found < len(token_ids):
        if not load_scalar(element, row + token * size) > -np.inf:
            values[num_found], token_ids[num_found] = -np.inf, token
            num_found += 1
        token += 1


def logprobs(logits_NV: Tensor, token_ids_N: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.logprobs.logprobs`; V is a multiple of 16."""
    rows, num_rows, threads = Rows.of(logits_NV), len(logits_NV), torch.get_num_threads()
    maxima_NM = rows.empty_maxima(num_rows)
    find_maxima(*rows, maxima_NM, threads)
    peak_NC = np.empty((num_rows, rows.num_chunks), np.float32)
    sum_NC = np.empty((num_rows, rows.num_chunks))
    _sum_chunks(*rows, maxima_NM, peak_NC, sum_NC, threads)
    row_threads = max(1, min(threads, num_rows))
    chosen_N = np.empty(num_rows, np.float32)
    top_value_NM = np.empty((num_rows, num_top), np.float32)
    top_id_NM = np.empty((num_rows, num_top), np.int64)
    _finish_rows(
        *rows,
        maxima_NM,
        peak_NC,
        sum_NC,
        rows.empty_lists(row_threads if num_top else 0),
        token_ids_N.numpy(),
        chosen_N,
        top_value_NM,
        top_id_NM,
        row_threads,
    )
    chosen, top_value, top_id = map(torch.from_numpy, (chosen_N, top_value_NM, top_id_NM))
    return chosen, top_value, top_id
