"""Drawing tokens from logits.

    keep the top_k largest logits; of those the fewest whose probabilities reach top_p;
    of those the ones with at least min_p times the largest probability;
    token = argmax over the kept of  logit / temperature + Gumbel(seed, position, token)

The noise is a pure function of (seed, position, token id), so a draw doesn't depend on the other
rows, on their number, or on what was drawn before. Temperature 0 takes the largest logit; top_k 0,
top_p 1 and min_p 0 cut nothing.

logits_SV float32; temperature, top_p, min_p float32; top_k, seed, position int64; all of length S.
"""

import torch
from torch import Tensor

CACHED_VALUES = 1 << 18  # logits worked on at a time: a dozen passes over more leave the cache
TOP_K_BLOCK = 512
NOISE_RANGE = 19.5  # more than the largest possible noise, 16.64, minus the smallest, −2.82
MAX_PARTIAL_TOP_K = 1024  # above this a full sort of the row is no slower than a partial one

# SplitMix64 (Steele, Lea, Flood 2014) for the key of a row, MurmurHash3's 32-bit finaliser
# (Appleby 2011) for its 262,144 tokens, where 64-bit products would cost twice as much.
# All as signed numbers: torch has no unsigned arithmetic.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX64 = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_MIX32 = ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32), (16, 1))
_GOLDEN32 = 0x9E3779B1 - 2**32


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    seed_S: Tensor,
    position_S: Tensor,
) -> Tensor:
    """Token ids (int64, S)."""
    vocab_size = logits_SV.shape[1]
    token_ids_S = logits_SV.argmax(-1)
    is_random_S = temperature_S > 0
    is_partial_S = (top_k_S > 0) & (top_k_S <= min(MAX_PARTIAL_TOP_K, vocab_size))
    is_uncut_S = (top_k_S == 0) & (top_p_S == 1)
    # Which of several equal logits `topk` takes depends on how many it is asked for, so that number
    # is a row's own, never the largest of the batch.
    num_sorted_S = torch.where(is_partial_S, top_k_S, vocab_size).masked_fill(is_uncut_S, 0)
    for num_sorted in torch.unique(num_sorted_S[is_random_S]).tolist():
        rows_S = (is_random_S & (num_sorted_S == num_sorted)).nonzero()[:, 0]
        for rows in rows_S.split(max(1, CACHED_VALUES // vocab_size)):
            logits_SC = logits_SV[rows] / temperature_S[rows, None]
            if num_sorted:
                logits_SC, candidates_SC = _top_k(logits_SC, num_sorted)
                logits_SC = _cut_top_k_top_p(logits_SC, top_k_S[rows], top_p_S[rows])
            else:
                candidates_SC = _contenders(logits_SC)
                logits_SC = logits_SC.gather(1, candidates_SC)
            logits_SC = _cut_min_p(logits_SC, min_p_S[rows])
            noise_SC = gumbel(seed_S[rows], position_S[rows], candidates_SC)
            winners = (logits_SC + noise_SC).argmax(-1, keepdim=True)
            token_ids_S[rows] = candidates_SC.gather(1, winners)[:, 0]
    return token_ids_S


def _contenders(logits_SV: Tensor) -> Tensor:
    """Tokens that noise could lift above a row's largest logit: few, as a rule, of many."""
    # Not `>=`: a row of NaN, the model's fault, still has to give some token.
    could_win_SV = ~(logits_SV < logits_SV.amax(-1, keepdim=True) - NOISE_RANGE)
    return could_win_SV.any(0).nonzero()[:, 0].expand(len(logits_SV), -1)


def _top_k(logits_SV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits in falling order and where they are.

    They lie in the k blocks with the largest maxima, so only those need sorting.
    """
    num_rows, vocab_size = logits_SV.shape
    if vocab_size % TOP_K_BLOCK or 2 * k * TOP_K_BLOCK > vocab_size:
        return logits_SV.topk(k, dim=-1)
    blocks_SNB = logits_SV.view(num_rows, -1, TOP_K_BLOCK)
    chosen_SK = blocks_SNB.amax(-1).topk(k, dim=-1).indices
    kept_SKB = blocks_SNB.gather(1, chosen_SK[..., None].expand(-1, -1, TOP_K_BLOCK))
    logits_SK, index_SK = kept_SKB.flatten(1).topk(k, dim=-1)
    block_SK = chosen_SK.gather(1, index_SK // TOP_K_BLOCK)
    return logits_SK, block_SK * TOP_K_BLOCK + index_SK % TOP_K_BLOCK


def gumbel(seed_S: Tensor, position_S: Tensor, token_ids_SC: Tensor) -> Tensor:
    """Standard Gumbel noise of each row's tokens: float32, S×C."""
    key_S = _mix(_mix(seed_S * _GAMMA, _MIX64) + position_S * _GAMMA, _MIX64)
    low_S, high_S = key_S.to(torch.int32), _shift_right(key_S, 32).to(torch.int32)
    bits = _mix(token_ids_SC.to(torch.int32) * _GOLDEN32 + low_S[:, None], _MIX32)
    bits = _mix(bits ^ high_S[:, None], _MIX32)
    # 23 bits and a half: exact in float32, and never 0 or 1, where a logarithm would be infinite.
    uniform = (_shift_right(bits, 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


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


def _cut_min_p(logits_SC: Tensor, min_p_S: Tensor) -> Tensor:
    largest = logits_SC.amax(-1, keepdim=True)
    return logits_SC.masked_fill(logits_SC < largest + min_p_S[:, None].log(), -torch.inf)


def _mix(x: Tensor, rounds: tuple[tuple[int, int], ...]) -> Tensor:
    for shift, factor in rounds:
        x = (x ^ _shift_right(x, shift)) * factor
    return x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; `>>` alone would drag the sign along."""
    width = torch.iinfo(x.dtype).bits
    return (x >> bits) & ((1 << (width - bits)) - 1)
