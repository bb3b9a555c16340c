"""Which experts a token goes to, and how much each one counts.

    chosen = the A experts of highest score, the lower id first among equals
    w = softmax(scores of the chosen) · per_expert_scale[chosen]

That is Gemma 4's softmax over all E experts, top-k and division by the sum of the k: the
denominator over all E cancels.

T tokens   E experts   A experts per token
scores_TE, per_expert_scale_E any float dtype → chosen_TA int32, best first, weights_TA float32.
All in float32. The kernel takes NaN scores for −inf, and ids are below E whatever the scores are.

One program takes BLOCK_T rows of scores, a warp for each, and looks A times for the maximum:

    scores [BLOCK_T, BLOCK_E]  ──A × (max, its lowest id, take it out)──▶  [BLOCK_T, BLOCK_A]
"""

import torch
from torch import Tensor

from bezel.kernels.cpu import combine
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.jit import runs_triton, tl, triton

_BLOCK_T = 4


def route_reference(
    scores_TE: Tensor, per_expert_scale_E: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    # A stable sort, as topk may take any of two equal scores.
    scores_TE, order_TE = scores_TE.float().sort(dim=-1, descending=True, stable=True)
    chosen_TA = order_TE[:, :top_k]
    weights_TA = torch.softmax(scores_TE[:, :top_k], dim=-1)
    return chosen_TA.int(), weights_TA * per_expert_scale_E.float()[chosen_TA]


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    scores_ptr,
    scale_ptr,
    chosen_ptr,
    weights_ptr,
    num_tokens,
    num_experts,
    stride_st,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, BLOCK_E)
    o_a = tl.arange(0, BLOCK_A)
    m_t = o_t < num_tokens
    # [BLOCK_T, BLOCK_E]
    m_scores = m_t[:, None] & (o_e < num_experts)[None, :]
    p_scores = scores_ptr + o_t[:, None] * stride_st + o_e[None, :]
    b_scores = tl.load(p_scores, mask=m_scores, other=float("-inf")).to(tl.float32)
    # A NaN would equal no maximum, not even its own.
    b_scores = tl.where(b_scores == b_scores, b_scores, float("-inf"))
    m_free = tl.full([BLOCK_T, BLOCK_E], 1, tl.int1)
    b_chosen = tl.zeros([BLOCK_T, BLOCK_A], tl.int32)
    b_top = tl.full([BLOCK_T, BLOCK_A], float("-inf"), tl.float32)
    for j in range(TOP_K):
        b_free = tl.where(m_free, b_scores, float("-inf"))
        b_best = tl.max(b_free, 1)
        m_best = m_free & (b_free == b_best[:, None])
        b_id = tl.min(tl.where(m_best, o_e[None, :], BLOCK_E), 1)
        m_free = m_free & (o_e[None, :] != b_id[:, None])
        b_chosen = tl.where(o_a[None, :] == j, b_id[:, None], b_chosen)
        b_top = tl.where(o_a[None, :] == j, b_best[:, None], b_top)
    b_exp = tl.exp(b_top - tl.max(b_top, 1)[:, None])
    b_weights = b_exp / tl.sum(b_exp, 1)[:, None]
    # [BLOCK_T, BLOCK_A]
    m_out = m_t[:, None] & (o_a < TOP_K)[None, :]
    o_out = o_t[:, None] * TOP_K + o_a[None, :]
    b_scale = tl.load(scale_ptr + b_chosen, mask=m_out, other=0.0).to(tl.float32)
    tl.store(chosen_ptr + o_out, b_chosen, mask=m_out)
    tl.store(weights_ptr + o_out, b_weights * b_scale, mask=m_out)


def route(scores_TE: Tensor, per_expert_scale_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids chosen_TA of the `top_k` experts and their weights_TA; rows of scores may be strided."""
    if runs_numba(scores_TE) and runs_numba(per_expert_scale_E):
        return combine.route(scores_TE, per_expert_scale_E, top_k)
    if not runs_triton(scores_TE):
        return route_reference(scores_TE, per_expert_scale_E, top_k)
    num_tokens, num_experts = scores_TE.shape
    assert scores_TE.stride(1) == 1 and top_k <= num_experts
    chosen_TA = scores_TE.new_empty((num_tokens, top_k), dtype=torch.int32)
    weights_TA = scores_TE.new_empty((num_tokens, top_k), dtype=torch.float32)
    _route_kernel[(triton.cdiv(num_tokens, _BLOCK_T),)](
        scores_TE,
        per_expert_scale_E,
        chosen_TA,
        weights_TA,
        num_tokens,
        num_experts,
        scores_TE.stride(0),
        TOP_K=top_k,
        BLOCK_T=_BLOCK_T,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_A=triton.next_power_of_2(top_k),
        num_warps=_BLOCK_T,
    )
    return chosen_TA, weights_TA
