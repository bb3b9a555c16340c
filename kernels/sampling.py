"""Drawing tokens from logits.

    keep the top_k largest logits; of those the fewest whose probabilities reach top_p;
    of those the ones with at least min_p times the largest probability;
    token = argmax over the kept of  logit / temperature + Gumbel(seed, position, token)

Of equal logits the lower token id ranks first. Temperature 0 takes the largest logit; top_k 0 or
above V, top_p 1 and min_p 0 cut nothing.

S rows   V vocabulary   C tokens that may be drawn   N rows of one kind   B blocks of BLOCK_V tokens

logits_SV any float dtype; all arithmetic in float32. What a row draws depends on the row alone: its
sums are taken in an order of its own, its noise is a function of (seed, position, token).

The host knows all parameters, and deals with rows by kind; nothing is read back from the device:

    greedy, no top_k or top_p   best of each block, then of all    reads the logits once (with min_p
                                                                   twice: first for the maximum)
    top_k ≤ MAX_TOP_K           list of candidates, see there;     reads the logits once
                                a program searches each list
    other cuts                  a program searches each row        reads the logits 20 times or more
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.candidates import MAX_TOP_K, MAX_VOCAB_SIZE, largest
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.cpu.sampling import sample as cpu_sample
from bezel.kernels.draw import Parameters, draw_cut, draw_uncut
from bezel.kernels.gumbel import NOISE_RANGE, gumbel, noise_key
from bezel.kernels.jit import runs_triton

CACHED_VALUES = 1 << 18  # logits worked on at a time: a dozen passes over more leave the cache


class Kind(IntEnum):
    """Without noise; or how many logits have to be ranked: none, `top_k` of them, or all."""

    GREEDY = 0
    UNCUT = 1
    TOP_K = 2
    CUT = 3


def kind_of(temperature: float, top_k: int, top_p: float) -> Kind:
    if temperature == 0:
        return Kind.GREEDY
    if top_k == 0 and top_p == 1:
        return Kind.UNCUT
    return Kind.TOP_K if 0 < top_k <= MAX_TOP_K else Kind.CUT


def sample_reference(logits_SV: Tensor, params: Parameters, kinds: Sequence[Kind]) -> Tensor:
    token_ids_S = torch.empty(len(kinds), dtype=torch.int64)
    members: dict[tuple[Kind, int], list[int]] = {}
    for row, (kind, k) in enumerate(zip(kinds, params.top_k_S.tolist(), strict=True)):
        members.setdefault((kind, k if kind is Kind.TOP_K else 0), []).append(row)
    for (kind, k), all_rows in members.items():
        at_once = CACHED_VALUES // logits_SV.shape[1] if kind is not Kind.GREEDY else len(kinds)
        for rows in torch.tensor(all_rows).split(max(1, at_once)):
            own = Parameters(*(column_S[rows] for column_S in params))
            # A copy of all rows would take longer than a greedy draw.
            own_SV = logits_SV if len(rows) == len(logits_SV) else logits_SV[rows]
            token_ids_S[rows] = _draw(own_SV.float(), own, kind, k)
    return token_ids_S


def _draw(logits_SV: Tensor, params: Parameters, kind: Kind, k: int) -> Tensor:
    """Rows of one kind, and where that is TOP_K of one k."""
    if kind is Kind.GREEDY:
        return logits_SV.argmax(-1)
    temperature_S1 = params.temperature_S[:, None]
    if kind is Kind.UNCUT:
        ids_SC = _contenders(logits_SV, temperature_S1)
        scores_SC = logits_SV.gather(1, ids_SC) / temperature_S1
    else:
        logits_SC, ids_SC = largest(logits_SV, k or logits_SV.shape[1])
        scores_SC = _cut_top_k_top_p(logits_SC / temperature_S1, params.top_k_S, params.top_p_S)
    floor_S1 = scores_SC.amax(-1, keepdim=True) + params.log_min_p_S[:, None]
    scores_SC = scores_SC.masked_fill(scores_SC < floor_S1, -torch.inf)
    winners_S1 = (scores_SC + gumbel(params.key_S, ids_SC)).argmax(-1, keepdim=True)
    return ids_SC.gather(1, winners_S1)[:, 0]


def _contenders(logits_SV: Tensor, temperature_S1: Tensor) -> Tensor:
    """Tokens that noise could lift above a row's largest logit: few, as a rule, of many."""
    floor_S1 = logits_SV.amax(-1, keepdim=True) - NOISE_RANGE * temperature_S1
    # Not `>=`: a row of NaN, the model's fault, still has to give some token.
    could_win_SV = ~(logits_SV < floor_S1)
    return could_win_SV.any(0).nonzero()[:, 0].expand(len(logits_SV), -1)


def _cut_top_k_top_p(logits_SC: Tensor, top_k_S: Tensor, top_p_S: Tensor) -> Tensor:
    """Logits in falling order, with −inf for what is cut."""
    rank = torch.arange(logits_SC.shape[1], device=logits_SC.device)
    cut_k = (rank >= top_k_S[:, None]) & (top_k_S[:, None] > 0)
    logits_SC = logits_SC.masked_fill(cut_k, -torch.inf)
    probabilities = logits_SC.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    # Rounding may bring the mass before a rare token to 1, and must not cut it at top_p = 1.
    cut_p = (mass_before >= top_p_S[:, None]) & (top_p_S[:, None] < 1) & (rank > 0)
    return logits_SC.masked_fill(cut_p, -torch.inf)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that the host doesn't wait for."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def sample(
    logits_SV: Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    seed: Sequence[int],
    position: Sequence[int],
) -> Tensor:
    """Token ids (int64, S), on the device of the logits; V ≤ MAX_VOCAB_SIZE.

    The parameters, one for each row, are in host memory. Seeds are any 64-bit integers. Of a row
    of nothing but NaN and −inf some token is drawn.
    """
    vocab_size = logits_SV.shape[1]
    assert vocab_size <= MAX_VOCAB_SIZE and logits_SV.stride(1) == 1
    top_k = [k if k < vocab_size else 0 for k in top_k]
    if runs_numba(logits_SV, vocab_size):
        return cpu_sample(logits_SV, temperature, top_k, top_p, min_p, seed, position)
    kinds = [kind_of(*row) for row in zip(temperature, top_k, top_p, strict=True)]
    temperature_S, top_p_S, min_p_S = (
        torch.tensor(column, dtype=torch.float32) for column in (temperature, top_p, min_p)
    )
    top_k_S, seed_S, position_S = (
        torch.tensor(column, dtype=torch.int64) for column in (top_k, seed, position)
    )
    key_S = noise_key(seed_S, position_S)
    params = Parameters(temperature_S, top_p_S, min_p_S.log(), top_k_S, key_S)
    if runs_triton(logits_SV):
        has_min_p = any(p > 0 for p, kind in zip(min_p, kinds, strict=True) if kind is Kind.UNCUT)
        return _sample_by_kernels(logits_SV, params, kinds, has_min_p)
    return sample_reference(logits_SV, params, kinds)


def _sample_by_kernels(
    logits_SV: Tensor, params: Parameters, kinds: list[Kind], has_min_p: bool
) -> Tensor:
    """`has_min_p`: whether any of the rows that nothing else cuts has a min_p."""
    device = logits_SV.device
    rows = {kind: [row for row, own in enumerate(kinds) if own is kind] for kind in Kind}
    num_noisy, num_top_k = len(rows[Kind.UNCUT]), len(rows[Kind.TOP_K])
    uncut_N = torch.tensor(rows[Kind.GREEDY] + rows[Kind.UNCUT], dtype=torch.int64)
    cut_N = torch.tensor(rows[Kind.TOP_K] + rows[Kind.CUT], dtype=torch.int64)
    temperature_S, top_p_S, log_min_p_S = _send_columns(params[:3], device)
    top_k_S, key_S, uncut_NP, cut_NP = _send_columns((*params[3:], uncut_N, cut_N), device)
    params = Parameters(temperature_S, top_p_S, log_min_p_S, top_k_S, key_S)
    token_ids_S = torch.empty(len(kinds), dtype=torch.int64, device=device)
    if len(uncut_N):
        rows_N = uncut_NP[: len(uncut_N)]
        draw_uncut(logits_SV, rows_N, params, num_noisy > 0, has_min_p, token_ids_S)
    if len(cut_N):
        draw_cut(logits_SV, cut_NP[: len(cut_N)], params, num_top_k, token_ids_S)
    return token_ids_S


def _send_columns(columns: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Columns of one dtype as one copy, padded to one length.

    That is a multiple of 16, so that all columns begin at one: Triton compiles a kernel anew when
    an address is the first that isn't, and a step would have to wait.
    """
    length = -(-max(len(column) for column in columns) // 16) * 16
    padded = [F.pad(column, (0, length - len(column))) for column in columns]
    return to_device(torch.stack(padded), device).unbind()
