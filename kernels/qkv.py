"""What stands between a layer's fused projection and its attention: the norms of each head, RoPE,
and the write to the paged cache.

    q = RoPE(rms(x_q) · w_q)     k = RoPE(rms(x_k) · w_k)     v = rms(x_v)  (Gemma 3: v = x_v)

Some global layers have one projection for keys and values, so that k = RoPE(w_k ⊙ v). Of their keys
only the turned pairs are stored, behind the value. The rest of a key is w_k ⊙ v, and it is the
query that brings this w_k along:

    stored row     [ v (K) | turned pairs of k (2 J) ]                                  C = K + 2 J
    packed query   [ q ⊙ w_k, but zero where pairs are turned (K) | turned pairs of q (2 J) ]

T tokens   N heads of the projection: H of q, G of k, G of v   K head width   J turned pairs
C values of a packed row   P pages   B tokens per page

Projection, caches and results have one float dtype; weights, cosines and sines are float32, slots
int64. Everything is computed in float32 and rounded once, when it is stored. (The references round
norms to the projection's dtype before they go on.)

A program takes BLOCK_N heads of one kind from one token. Two tiles hold the halves of the heads:
the two values of a pair stand at the same place.

    token t   │q q q q┊q q q q│k k · ·│v v · ·│      H = 8, G = 2, BLOCK_N = 4: four programs

              K/2                                          ┌► row t of q
    first     x x x x ┐                                    │
              x x x x ├ Σ x² ─► · 1/rms ─► · w ─► turn ────┼► slot of t, if t < num_stored
    second    x x x x │                                    │
              x x x x ┘                                    └► row t − num_stored of k or v, if not
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bezel.kernels.cpu import qkv as cpu
from bezel.kernels.cpu.jit import runs_numba
from bezel.kernels.jit import runs_triton, tl, triton
from bezel.kernels.kv_pages import slot_offset, write_kv
from bezel.kernels.rms_norm import rms_norm_reference
from bezel.kernels.rotary import apply_rotary, turned_pairs

Launcher = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class QKVShape:
    """Heads of a layer. `key_is_value`: one projection for both, and k = RoPE(w_k ⊙ v)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_value_norm: bool
    key_is_value: bool

    def __post_init__(self) -> None:
        assert self.has_value_norm or not self.key_is_value, "k is made of the normed v"


def queries_reference(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    q_weight_K: Tensor,
    k_weight_K: Tensor | None,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
) -> Tensor:
    """q_THK, or packed queries q_THC."""
    q_THK = rms_norm_reference(qkv_TNK[:, : shape.num_heads], q_weight_K, eps)
    if not shape.key_is_value:
        return apply_rotary(q_THK, cos_TJ, sin_TJ)
    assert k_weight_K is not None
    num_pairs, half = cos_TJ.shape[1], shape.head_dim // 2
    folded = q_THK.float() * k_weight_K
    folded[..., :num_pairs] = 0
    folded[..., half : half + num_pairs] = 0
    return torch.cat((folded.to(q_THK.dtype), turned_pairs(q_THK, cos_TJ, sin_TJ)), dim=-1)


def keys_and_values_reference(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    k_weight_K: Tensor,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(k_TGK, v_TGK), or (packed rows k_TGC, None)."""
    first_value = shape.num_heads + shape.num_kv_heads
    x_TGK = qkv_TNK[:, shape.num_heads : first_value]
    v_TGK = x_TGK if shape.key_is_value else qkv_TNK[:, first_value:]
    if shape.has_value_norm:
        v_TGK = rms_norm_reference(v_TGK, None, eps)
    k_TGK = rms_norm_reference(x_TGK, k_weight_K, eps)
    if shape.key_is_value:
        return torch.cat((v_TGK, turned_pairs(k_TGK, cos_TJ, sin_TJ)), dim=-1), None
    return apply_rotary(k_TGK, cos_TJ, sin_TJ), v_TGK


@triton.jit
def _load_halves(x_ptr, m_x, HALF: tl.constexpr):
    """Values of first and of second halves in float32; `x_ptr` is where the first ones are."""
    # [BLOCK_N, BLOCK_J]
    b_first = tl.load(x_ptr, mask=m_x, other=0.0).to(tl.float32)
    # [BLOCK_N, BLOCK_J]
    b_second = tl.load(x_ptr + HALF, mask=m_x, other=0.0).to(tl.float32)
    return b_first, b_second


@triton.jit
def _store_halves(y_ptr, b_first, b_second, m_y, DISTANCE: tl.constexpr):
    tl.store(y_ptr, b_first, mask=m_y)
    tl.store(y_ptr + DISTANCE, b_second, mask=m_y)


@triton.jit
def _load_turn(cos_ptr, sin_ptr, m_turned):
    """Cosines and sines; pairs that RoPE leaves alone turn by nothing."""
    # [BLOCK_N, BLOCK_J]
    b_cos = tl.load(cos_ptr, mask=m_turned, other=1.0)
    # [BLOCK_N, BLOCK_J]
    b_sin = tl.load(sin_ptr, mask=m_turned, other=0.0)
    return b_cos, b_sin


@triton.jit
def _turned(b_first, b_second, b_cos, b_sin):
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@triton.jit
def _normed(b_first, b_second, HEAD_DIM: tl.constexpr, eps):
    b_squares = tl.sum(b_first * b_first + b_second * b_second, axis=1, keep_dims=True)
    b_inverse_rms = tl.rsqrt(b_squares / HEAD_DIM + eps)
    return b_first * b_inverse_rms, b_second * b_inverse_rms


# What changes from step to step: the count, and where in a step's inputs the slots begin.
@triton.jit(do_not_specialize=["num_stored"], do_not_specialize_on_alignment=["slot_ptr"])
def _qkv_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    stride_xt,
    stride_cp,
    num_stored,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    OWNS_KV: tl.constexpr,
    KEY_IS_VALUE: tl.constexpr,
    HAS_VALUE_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    Q_GROUPS: tl.constexpr = (NUM_HEADS + BLOCK_N - 1) // BLOCK_N
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + BLOCK_N - 1) // BLOCK_N
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = HEAD_DIM + 2 * NUM_PAIRS if KEY_IS_VALUE else HEAD_DIM
    i_t = tl.program_id(0).to(tl.int64)
    i_group = tl.program_id(1)
    o_n = tl.arange(0, BLOCK_N)[:, None]
    # Whole tiles even of what is the same for all heads: then everything that is loaded gets one
    # layout, and nothing goes through shared memory to change it.
    o_j = tl.broadcast_to(tl.arange(0, BLOCK_J)[None, :], (BLOCK_N, BLOCK_J))
    m_j = o_j < HALF
    m_turned = o_j < NUM_PAIRS
    qkv_ptr += i_t * stride_xt
    cos_ptr += i_t * NUM_PAIRS + o_j
    sin_ptr += i_t * NUM_PAIRS + o_j
    if i_group < Q_GROUPS:
        o_h = i_group * BLOCK_N + o_n
        m_q = (o_h < NUM_HEADS) & m_j
        b_first, b_second = _load_halves(qkv_ptr + o_h * HEAD_DIM + o_j, m_q, HALF)
        b_w_first, b_w_second = _load_halves(q_weight_ptr + o_j, m_j, HALF)
        b_cos, b_sin = _load_turn(cos_ptr, sin_ptr, m_turned)
        b_first, b_second = _normed(b_first, b_second, HEAD_DIM, eps)
        b_first *= b_w_first
        b_second *= b_w_second
        y_ptr = q_ptr + (i_t * NUM_HEADS + o_h) * WIDTH + o_j
        if KEY_IS_VALUE:
            b_w_first, b_w_second = _load_halves(k_weight_ptr + o_j, m_j, HALF)
            b_folded_first = tl.where(m_turned, 0.0, b_first * b_w_first)
            b_folded_second = tl.where(m_turned, 0.0, b_second * b_w_second)
            _store_halves(y_ptr, b_folded_first, b_folded_second, m_q, HALF)
        b_first, b_second = _turned(b_first, b_second, b_cos, b_sin)
        if KEY_IS_VALUE:
            _store_halves(y_ptr + HEAD_DIM, b_first, b_second, m_q & m_turned, NUM_PAIRS)
        else:
            _store_halves(y_ptr, b_first, b_second, m_q, HALF)
    elif OWNS_KV:
        # one value; tokens that are not stored now have no slot
        i_slot = tl.load(slot_ptr + i_t, mask=i_t < num_stored, other=-1)
        o_g = (i_group - Q_GROUPS) % KV_GROUPS * BLOCK_N + o_n
        m_kv = (o_g < NUM_KV_HEADS) & m_j
        m_stored = m_kv & (i_slot >= 0)
        o_stored = slot_offset(i_slot, stride_cp, NUM_KV_HEADS * WIDTH, PAGE_SIZE)
        o_stored += o_g * WIDTH + o_j
        i_new = i_t - num_stored
        m_new = m_kv & (i_new >= 0)
        o_new = (i_new * NUM_KV_HEADS + o_g) * HEAD_DIM + o_j
        if KEY_IS_VALUE or i_group < Q_GROUPS + KV_GROUPS:
            x_ptr = qkv_ptr + (NUM_HEADS + o_g) * HEAD_DIM + o_j
            b_first, b_second = _load_halves(x_ptr, m_kv, HALF)
            b_w_first, b_w_second = _load_halves(k_weight_ptr + o_j, m_j, HALF)
            b_cos, b_sin = _load_turn(cos_ptr, sin_ptr, m_turned)
            b_first, b_second = _normed(b_first, b_second, HEAD_DIM, eps)
            y_ptr = k_cache_ptr + o_stored
            if KEY_IS_VALUE:
                _store_halves(y_ptr, b_first, b_second, m_stored, HALF)
            b_first, b_second = b_first * b_w_first, b_second * b_w_second
            b_first, b_second = _turned(b_first, b_second, b_cos, b_sin)
            if KEY_IS_VALUE:
                m_stored = m_stored & m_turned
                _store_halves(y_ptr + HEAD_DIM, b_first, b_second, m_stored, NUM_PAIRS)
            else:
                _store_halves(y_ptr, b_first, b_second, m_stored, HALF)
            if k_ptr is not None:
                _store_halves(k_ptr + o_new, b_first, b_second, m_new, HALF)
        else:
            x_ptr = qkv_ptr + (NUM_HEADS + NUM_KV_HEADS + o_g) * HEAD_DIM + o_j
            b_first, b_second = _load_halves(x_ptr, m_kv, HALF)
            if HAS_VALUE_NORM:
                b_first, b_second = _normed(b_first, b_second, HEAD_DIM, eps)
            _store_halves(v_cache_ptr + o_stored, b_first, b_second, m_stored, HALF)
            if v_ptr is not None:
                _store_halves(v_ptr + o_new, b_first, b_second, m_new, HALF)


def head_tile(num_heads: int, head_dim: int) -> dict[str, int]:
    """Launch options, the same on every architecture.

    A thread has 8 values of each half, one 128-bit load of bfloat16; four warps hold 8 heads of 256
    or 4 of 512, which share what is loaded of weights, cosines and sines.
    """
    block_j = triton.next_power_of_2(head_dim // 2)
    block_n = min(max(1024 // block_j, 1), 8, triton.next_power_of_2(num_heads))
    return {"BLOCK_N": block_n, "BLOCK_J": block_j, "num_warps": max(block_n * block_j // 256, 1)}


def _launch(
    qkv_TNK: Tensor,
    shape: QKVShape,
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
    num_tokens, num_rows, head_dim = qkv_TNK.shape
    num_pairs = cos_TJ.shape[1]
    assert qkv_TNK.stride()[1:] == (head_dim, 1)
    assert cos_TJ.is_contiguous() and sin_TJ.is_contiguous()
    width = head_dim + 2 * num_pairs if shape.key_is_value else head_dim
    q_THC = qkv_TNK.new_empty(num_tokens, shape.num_heads, width)
    tile = head_tile(shape.num_heads, head_dim)
    num_groups = triton.cdiv(shape.num_heads, tile["BLOCK_N"])
    k_TGK, v_TGK, stride_cp, page_size = None, None, 0, 1
    if owns_kv:
        kinds = 1 if shape.key_is_value else 2
        assert num_rows == shape.num_heads + kinds * shape.num_kv_heads
        num_groups += kinds * triton.cdiv(shape.num_kv_heads, tile["BLOCK_N"])
        assert k_cache_PBGC is not None and (v_cache_PBGK is None) == shape.key_is_value
        assert v_cache_PBGK is None or v_cache_PBGK.stride() == k_cache_PBGC.stride()
        assert k_cache_PBGC.stride()[1:] == (shape.num_kv_heads * width, width, 1)
        stride_cp, page_size = k_cache_PBGC.stride(0), k_cache_PBGC.shape[1]
        if returns_new:
            new = (num_tokens - num_stored, shape.num_kv_heads, head_dim)
            k_TGK, v_TGK = qkv_TNK.new_empty(new), qkv_TNK.new_empty(new)
    _qkv_kernel[(num_tokens, num_groups)](
        qkv_TNK,
        q_weight_K,
        k_weight_K,
        cos_TJ,
        sin_TJ,
        slot_mapping_T,
        q_THC,
        k_TGK,
        v_TGK,
        k_cache_PBGC,
        v_cache_PBGK,
        qkv_TNK.stride(0),
        stride_cp,
        num_stored,
        eps,
        NUM_HEADS=shape.num_heads,
        NUM_KV_HEADS=shape.num_kv_heads,
        HEAD_DIM=head_dim,
        NUM_PAIRS=num_pairs,
        PAGE_SIZE=page_size,
        OWNS_KV=owns_kv,
        KEY_IS_VALUE=shape.key_is_value,
        HAS_VALUE_NORM=shape.has_value_norm,
        **tile,
    )
    return q_THC, k_TGK, v_TGK


def _kernel_launcher(qkv_TNK: Tensor, cos_TJ: Tensor) -> Launcher | None:
    """What launches the kernel of this device; None where there is only the reference."""
    if runs_numba(qkv_TNK, qkv_TNK.shape[-1] // 2, cos_TJ.shape[1]):
        return cpu.rotate_and_store
    return _launch if runs_triton(qkv_TNK) else None


def rotate_and_store_local(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    q_weight_K: Tensor,
    k_weight_K: Tensor | None,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
    k_cache_PBGK: Tensor | None,
    v_cache_PBGK: Tensor | None,
    slot_mapping_T: Tensor,
    num_stored: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries of a local layer, with the new keys and values that no page holds yet.

    Tokens [0, num_stored) are stored at their slots, unless that is `NO_SLOT`; the others are
    returned: (q_THK of all tokens, k_TGK and v_TGK of those from num_stored on). A layer that
    shares keys and values has no `k_weight_K`, a projection of queries only, and gets
    (q_THK, None, None).
    """
    assert not shape.key_is_value and num_stored <= len(qkv_TNK)
    turn = (qkv_TNK, shape, eps, q_weight_K, k_weight_K, cos_TJ, sin_TJ)
    launch = _kernel_launcher(qkv_TNK, cos_TJ)
    if launch is not None:
        pages = (k_cache_PBGK, v_cache_PBGK, slot_mapping_T)
        owns_kv = k_weight_K is not None
        return launch(*turn, *pages, num_stored, owns_kv=owns_kv, returns_new=True)
    q_THK = queries_reference(*turn)
    if k_weight_K is None:
        return q_THK, None, None
    k_TGK, v_TGK = keys_and_values_reference(qkv_TNK, shape, eps, k_weight_K, cos_TJ, sin_TJ)
    assert v_TGK is not None and k_cache_PBGK is not None and v_cache_PBGK is not None
    write_kv(k_TGK[:num_stored], k_cache_PBGK, slot_mapping_T[:num_stored])
    write_kv(v_TGK[:num_stored], v_cache_PBGK, slot_mapping_T[:num_stored])
    return q_THK, k_TGK[num_stored:], v_TGK[num_stored:]


def rotate_and_store_global(
    qkv_TNK: Tensor,
    shape: QKVShape,
    eps: float,
    q_weight_K: Tensor,
    k_weight_K: Tensor | None,
    cos_TJ: Tensor,
    sin_TJ: Tensor,
    k_cache_PBGC: Tensor,
    v_cache_PBGK: Tensor | None,
    slot_mapping_T: Tensor,
    owns_kv: bool,
) -> Tensor:
    """Queries of a global layer, after its new keys and values are stored.

    With `owns_kv` all tokens are stored at their slots, unless that is `NO_SLOT`; without, the
    projection holds queries only. Returns q_THK, or packed q_THC if `shape.key_is_value`: then
    `k_cache_PBGC` has packed rows, `v_cache_PBGK` is None and `k_weight_K` belongs to the layer
    whose keys are stored there.
    """
    turn = (qkv_TNK, shape, eps, q_weight_K, k_weight_K, cos_TJ, sin_TJ)
    launch = _kernel_launcher(qkv_TNK, cos_TJ)
    if launch is not None:
        pages = (k_cache_PBGC, v_cache_PBGK, slot_mapping_T)
        return launch(*turn, *pages, len(qkv_TNK), owns_kv=owns_kv, returns_new=False)[0]
    if owns_kv:
        assert k_weight_K is not None
        k_TGC, v_TGK = keys_and_values_reference(qkv_TNK, shape, eps, k_weight_K, cos_TJ, sin_TJ)
        write_kv(k_TGC, k_cache_PBGC, slot_mapping_T)
        if v_TGK is not None:
            assert v_cache_PBGK is not None
            write_kv(v_TGK, v_cache_PBGK, slot_mapping_T)
    return queries_reference(*turn)
