"""`kernels.sampling` on CPUs. A row is read once, twice or, for top_p alone, four times.

    all          maxima of blocks                                 see candidates
    greedy       search the one block that has the maximum
    top_k        list the k largest; top_p, min_p and the draw in that list
    top_p alone  where it cuts                                    see nucleus
    both other   bits of noise for whole blocks; logarithms only where these could win

A block's largest score is at most its largest logit with its largest noise, and seldom above the
best score found before. Of equal scores the lower token id wins. A row without a finite largest
logit, the model's fault, gives the first token that has it, or token 0.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from bezel.kernels.candidates import MAX_VOCAB_SIZE
from bezel.kernels.cpu.candidates import (
    BLOCK,
    CHUNK_BLOCKS,
    Array,
    Rows,
    boundary_key,
    find_maxima,
    key_token,
    key_value,
    larger,
    list_largest,
    num_blocks_of,
    num_chunks_of,
    rank_key,
    weight_of,
)
from bezel.kernels.cpu.gumbel import (
    MAX_NOISE,
    bits_of_lane,
    more_bits,
    most_bits,
    noise_bits,
    noise_key,
    noise_of_bits,
)
from bezel.kernels.cpu.jit import device, kernel
from bezel.kernels.cpu.lanes import LANES, lane_max, load, load_scalar, splat
from bezel.kernels.cpu.nucleus import (
    BUCKET_WIDTH,
    NUM_BUCKETS,
    choose_buckets,
    find_boundaries,
    list_buckets,
    sum_buckets,
)

_ALL_KEYS = (-0x800000 ^ 0x7FFFFFFF) << 24  # that of −∞, of the last token


@kernel
def _draw_listed(
    element,
    size,
    logits,
    stride,
    num_vectors,
    maxima,
    temperature,
    top_p,
    min_p,
    top_k,
    seeds,
    positions,
    lists,
    peaks,
    noise_keys,
    tokens,
    threads,
):
    """Greedy rows, and those with top_k, to the end; of the others the likeliest token, its logit
    and the key of their noise. `lists` has room for a row of keys for each thread."""
    for i_thread in prange(threads):
        num_rows = len(tokens)
        for n in range(i_thread * num_rows // threads, (i_thread + 1) * num_rows // threads):
            row = logits + n * stride
            peaks[n], tokens[n] = _likeliest(element, size, row, num_vectors, maxima[n])
            if temperature[n] == 0 or not np.isfinite(peaks[n]):
                continue
            noise_keys[n] = noise_key(seeds[n], positions[n])
            if top_k[n] > 0:
                keys = lists[i_thread]
                num_keys = list_largest(element, size, row, num_vectors, maxima[n], top_k[n], keys)
                tokens[n] = _draw_of_list(
                    keys[:num_keys], peaks[n], temperature[n], top_p[n], min_p[n], noise_keys[n]
                )


@device
def _likeliest(element, size, row, num_vectors, maxima):
    """The largest logit of a row and the first token that has it."""
    num_blocks = num_blocks_of(num_vectors)
    peak, best = np.float32(-np.inf), 0
    for block in range(num_blocks):
        if maxima[num_blocks * LANES + block] > peak:
            peak, best = maxima[num_blocks * LANES + block], block
    for token in range(best * BLOCK, min(best * BLOCK + BLOCK, num_vectors * LANES)):
        if load_scalar(element, row + token * size) == peak:
            return peak, token
    return peak, 0


@device
def _floor_score(peak, temperature, min_p):
    if min_p <= 0:
        return np.float32(-np.inf)
    return peak / temperature + np.float32(math.log(np.float64(min_p)))


@device
def _noise(token, key):
    return noise_of_bits(bits_of_lane(noise_bits(token, key), 0))


@device
def _draw_of_list(keys, peak, temperature, top_p, min_p, noise):
    low = _ALL_KEYS
    if top_p < 1:
        mass = 0.0
        for key in keys:
            mass += weight_of(key, peak, temperature)
        # Rounded to float32, 0.8 of 40 equals is 32 of them: top_p itself is a little above 0.8.
        target = np.float64(np.float32(top_p * mass))
        low = boundary_key(keys, len(keys), target, True, peak, temperature)
    floor = _floor_score(peak, temperature, min_p)
    best_score, best_token = np.float32(-np.inf), 0
    for key in keys:
        score, token = key_value(key) / temperature, key_token(key)
        if key >= low and score >= floor:
            score += _noise(token, noise)
            if score > best_score or (score == best_score and token < best_token):
                best_score, best_token = score, token
    return best_token


@kernel
def _draw_chunks(
    element,
    size,
    logits,
    stride,
    num_vectors,
    rows,
    maxima,
    temperature,
    min_p,
    peaks,
    noise_keys,
    lows,
    likeliest,
    scores,
    drawn,
    threads,
):
    """The best score of each chunk of `rows` and its token: float32 and int64, R×chunks."""
    num_chunks, num_blocks = num_chunks_of(num_vectors), num_blocks_of(num_vectors)
    for i_thread in prange(threads):
        num_tasks = len(rows) * num_chunks
        for task in range(i_thread * num_tasks // threads, (i_thread + 1) * num_tasks // threads):
            r, first = task // num_chunks, task % num_chunks * CHUNK_BLOCKS
            n = rows[r]
            # The likeliest token is always kept, and others have to be better from the start.
            token = likeliest[n]
            best = peaks[n] / temperature[n] + _noise(token, noise_keys[n]), token
            floor = _floor_score(peaks[n], temperature[n], min_p[n])
            for block in range(first, min(first + CHUNK_BLOCKS, num_blocks)):
                maximum = maxima[n, num_blocks * LANES + block]
                score = maximum / temperature[n]
                if (
                    maximum >= key_value(lows[n])
                    and score >= floor
                    and score + MAX_NOISE >= best[0]
                ):
                    best = _best_of_block(
                        element,
                        size,
                        logits + n * stride,
                        block * LANES,
                        min(block * LANES + LANES, num_vectors),
                        score,
                        temperature[n],
                        floor,
                        lows[n],
                        noise_keys[n],
                        best,
                    )
            scores[r, task % num_chunks], drawn[r, task % num_chunks] = best


@device
def _best_of_block(
    element, size, row, first, end, block_score, temperature, floor, low, noise, best
):
    """`best`, a score and its token, or what is better among the vectors from `first` to `end`."""
    bits = noise_bits(first * LANES, noise)
    for i in range(first + 1, end):
        bits = more_bits(bits, noise_bits(i * LANES, noise))
    if block_score + noise_of_bits(most_bits(bits)) < best[0]:
        return best
    for i in range(first, end):
        bits = noise_bits(i * LANES, noise)
        x = larger(load(element, row + i * LANES * size), splat(-np.inf))
        limit = lane_max(x) / temperature + noise_of_bits(most_bits(bits))
        if limit >= best[0]:
            best = _best_of_vector(
                element, size, row, i * LANES, temperature, floor, low, noise, best
            )
    return best


@device
def _best_of_vector(element, size, row, first, temperature, floor, low, noise, best):
    bits = noise_bits(first, noise)
    for lane in range(LANES):
        token = first + lane
        value = load_scalar(element, row + token * size)
        score = value / temperature
        if value > -np.inf and score >= floor and score + MAX_NOISE >= best[0]:
            score += noise_of_bits(bits_of_lane(bits, lane))
            is_better = score > best[0] or (score == best[0] and token < best[1])
            if is_better and rank_key(value, token) >= low:
                best = score, token
    return best


def sample(
    logits_SV: Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    seed: Sequence[int],
    position: Sequence[int],
) -> Tensor:
    """As `kernels.sampling.sample`; V is a multiple of 16."""
    rows, num_rows, threads = Rows.of(logits_SV), len(logits_SV), torch.get_num_threads()
    temperature_S, top_p_S, min_p_S = np.array((temperature, top_p, min_p), np.float32)
    top_k_S, seed_S, position_S = np.array((top_k, seed, position), np.int64)
    maxima_SM = rows.empty_maxima(num_rows)
    find_maxima(*rows, maxima_SM, threads)
    peak_S, noise_key_S = np.empty(num_rows, np.float32), np.empty(num_rows, np.int64)
    token_ids_S = np.empty(num_rows, np.int64)
    row_threads = max(1, min(threads, num_rows))
    _draw_listed(
        *rows,
        maxima_SM,
        temperature_S,
        top_p_S,
        min_p_S,
        top_k_S,
        seed_S,
        position_S,
        rows.empty_lists(row_threads if any(top_k) else 0),
        peak_S,
        noise_key_S,
        token_ids_S,
        row_threads,
    )
    is_whole_S = (temperature_S > 0) & (top_k_S == 0) & np.isfinite(peak_S)
    if is_whole_S.any():
        cut_R = (is_whole_S & (top_p_S < 1)).nonzero()[0]
        low_S = np.full(num_rows, _ALL_KEYS)
        if len(cut_R):
            _cut_by_top_p(rows, cut_R, maxima_SM, peak_S, temperature_S, top_p_S, low_S)
        row_R = is_whole_S.nonzero()[0]
        score_RC = np.empty((len(row_R), rows.num_chunks), np.float32)
        token_RC = np.empty((len(row_R), rows.num_chunks), np.int64)
        _draw_chunks(
            *rows,
            row_R,
            maxima_SM,
            temperature_S,
            min_p_S,
            peak_S,
            noise_key_S,
            low_S,
            token_ids_S,
            score_RC,
            token_RC,
            threads,
        )
        is_best_RC = score_RC == score_RC.max(1, keepdims=True)
        token_ids_S[row_R] = np.where(is_best_RC, token_RC, MAX_VOCAB_SIZE).min(1)
    return torch.from_numpy(token_ids_S)


def _cut_by_top_p(
    rows: Rows,
    row_R: Array,
    maxima_SM: Array,
    peak_S: Array,
    temperature_S: Array,
    top_p_S: Array,
    low_S: Array,
) -> None:
    """Put the last key that top_p keeps of the rows `row_R` into `low_S`."""
    num_rows, threads = len(row_R), torch.get_num_threads()
    row_threads = min(threads, num_rows)
    bucket_RCB = np.zeros((num_rows, rows.num_chunks, NUM_BUCKETS * BUCKET_WIDTH), np.float32)
    total_RC = np.empty((num_rows, rows.num_chunks))
    sum_buckets(*rows, row_R, peak_S, temperature_S, top_p_S, bucket_RCB, total_RC, threads)
    chosen_R, target_R = np.empty(num_rows, np.int64), np.empty(num_rows)
    choose_buckets(top_p_S, row_R, bucket_RCB, total_RC, chosen_R, target_R, row_threads)
    key_RV = rows.empty_lists(num_rows)
    count_RC = np.empty((num_rows, rows.num_chunks), np.int64)
    list_buckets(
        *rows,
        row_R,
        peak_S,
        temperature_S,
        top_p_S,
        maxima_SM,
        chosen_R,
        key_RV,
        count_RC,
        threads,
    )
    find_boundaries(row_R, peak_S, temperature_S, key_RV, count_RC, target_R, low_S, row_threads)
