"""How decode attention cuts a sequence into splits, and the output of their parts.

    o = Σᵢ 2^(lseᵢ − m) oᵢ / Σᵢ 2^(lseᵢ − m),  m = maxᵢ lseᵢ        over a sequence's splits i

    part_o_ITHK      outputs of the splits, float32; lse = log₂ Σ 2^score in part_lse_ITH, float32
    seq_lens_S       int64; T = S · q_len
    → o_THK          written where a sequence has several splits

A sequence has a split for every `min_len` positions that it sees, but at least one and at most
`max_count`. Nothing else decides it, so that an output is the same in any batch.

One program computes BLOCK_V values of one query head. It takes BLOCK_P parts at a time, in order.
"""

from typing import NamedTuple

from torch import Tensor

from bezel.kernels.jit import tl, triton

_SHORTEST, _LONGEST = 128, 2048  # positions; the latter per kv head


class Splits(NamedTuple):
    """The rule of one launch; `window` is 0 where there is none."""

    min_len: int
    max_count: int
    window: int
    q_len: int

    @classmethod
    def of(
        cls,
        num_rows: int,
        num_kv_heads: int,
        value_dim: int,
        turned: int,
        window: int | None,
        q_len: int,
    ) -> "Splits":
        """For `num_rows` queries per kv head; `turned` is 0 where keys and values lie apart.

        A further split costs its part, `num_rows` outputs written and read in float32, and reads
        the queries again. Splits are so long that this is a twentieth of the keys and values that
        they read. But a sequence alone shouldn't leave the whole GPU to one program: it gets one
        for every 2,048 positions, whatever they cost.
        """
        width = value_dim + turned
        # In 16-bit numbers.
        added = num_rows * (4 * value_dim + width)
        read = width if turned else 2 * width
        min_len = max(_SHORTEST, -(-20 * added // read))
        max_count = 64 if num_kv_heads <= 2 else 32
        return cls(min(min_len, _LONGEST * num_kv_heads), max_count, window or 0, q_len)

    def most(self, max_len: int) -> int:
        """The largest number of splits of any sequence of up to `max_len` positions."""
        span = self.window + self.q_len - 1 if self.window else max_len
        return max(1, min(span // self.min_len, self.max_count))


@triton.jit
def live_splits(
    seq_len,
    MIN_LEN: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_LEN: tl.constexpr,
):
    """The first position that a sequence sees, and the number of its splits."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - Q_LEN + 1 - WINDOW, 0)
    return first, tl.maximum(tl.minimum((seq_len - first) // MIN_LEN, MAX_COUNT), 1)


@triton.jit(do_not_specialize=["seq_lens_ptr"])
def _combine(
    part_o_ptr,
    part_lse_ptr,
    seq_lens_ptr,
    o_ptr,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    MIN_LEN: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_LEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_t = tl.program_id(0)
    seq_len = tl.load(seq_lens_ptr + i_t // Q_LEN).to(tl.int32)
    _, num_live = live_splits(seq_len, MIN_LEN, MAX_COUNT, WINDOW, Q_LEN)
    if num_live == 1:
        return
    i_row = i_t.to(tl.int64) * NUM_HEADS + tl.program_id(1)
    o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < VALUE_DIM
    b_max = float("-inf")
    b_sum = 0.0
    b_o = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_live, BLOCK_P):
        i_split = start + tl.arange(0, BLOCK_P)
        m_p = i_split < num_live
        i_part = i_split.to(tl.int64) * (tl.num_programs(0) * NUM_HEADS) + i_row
        b_lse = tl.load(part_lse_ptr + i_part, mask=m_p, other=float("-inf"))
        # [BLOCK_P, BLOCK_V]
        b_part = tl.load(
            part_o_ptr + i_part[:, None] * VALUE_DIM + o_v[None, :],
            mask=m_p[:, None] & m_v[None, :],
            other=0.0,
        )
        # Finite: a query that sees nothing of the first split sees the second.
        b_new_max = tl.maximum(b_max, tl.max(b_lse, 0))
        b_weight = tl.exp2(b_lse - b_new_max)
        b_rescale = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_rescale + tl.sum(b_weight, 0)
        b_o = b_o * b_rescale + tl.sum(b_weight[:, None] * b_part, 0)
        b_max = b_new_max
    b_o = b_o / b_sum
    tl.store(o_ptr + i_row * VALUE_DIM + o_v, b_o.to(o_ptr.dtype.element_ty), mask=m_v)


def combine_splits(
    part_o_ITHK: Tensor, part_lse_ITH: Tensor, seq_lens_S: Tensor, o_THK: Tensor, splits: Splits
) -> None:
    """Write the outputs of sequences that have more than one split."""
    _, num_tokens, num_heads, value_dim = part_o_ITHK.shape
    block_v = min(128, triton.next_power_of_2(value_dim))
    _combine[(num_tokens, num_heads, triton.cdiv(value_dim, block_v))](
        part_o_ITHK,
        part_lse_ITH,
        seq_lens_S,
        o_THK,
        NUM_HEADS=num_heads,
        VALUE_DIM=value_dim,
        MIN_LEN=splits.min_len,
        MAX_COUNT=splits.max_count,
        WINDOW=splits.window,
        Q_LEN=splits.q_len,
        BLOCK_P=8,
        BLOCK_V=block_v,
        num_warps=4,
    )
