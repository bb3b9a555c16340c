"""The gated MLPs of the experts that each token chose.

    y[t, j] = down[e] · (gelu_tanh(gate[e] · x[t]) ⊙ (up[e] · x[t]))        e = chosen[t, j]

A dense MLP of n·F hidden units beside the experts is n pseudo-experts more: the i-th has the hidden
units [i·F, (i+1)·F), every token chooses all of them, and their sum is the dense MLP. They read
`x_dense_TD` and follow the chosen experts in y, so X = A + n.

T tokens   D model width   E experts   A experts per token   F expert width   X rows per token
x_TD   chosen_TA int32   gate_up_EFD (gate first, then up)   down_EDF   → y_TXD in x's dtype
Sums are in float32; what lies between the two products is in x's dtype.

    chosen_TA ─ moe_dispatch ─▶ row blocks ─▶ gate_up ─▶ hidden_RF ─▶ down ─▶ y_TXD

Up to _MAX_UNSORTED tokens are not sorted. Both products are described in `moe_gemm`.
"""

from torch import Tensor
from torch.nn import functional as F

from bezel.kernels.gelu_mul import gelu_times_reference
from bezel.kernels.jit import runs_triton, triton
from bezel.kernels.moe_dispatch import dispatch, dispatch_reference
from bezel.kernels.moe_gemm import down_kernel, gate_up_kernel, tile_options

MAX_DENSE_TOKENS = 64  # more tokens than this make good use of a dense MLP of its own
_MAX_UNSORTED = 4


def moe_mlp_reference(
    x_routed_TD: Tensor,
    x_dense_TD: Tensor | None,
    chosen_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    dense_gate_up_FD: Tensor | None,
    dense_down_DF: Tensor | None,
) -> Tensor:
    num_tokens, dim = x_routed_TD.shape
    top_k, width = chosen_TA.shape[1], down_EDF.shape[2]
    num_dense = 0 if dense_down_DF is None else dense_down_DF.shape[1] // width
    y_TXD = x_routed_TD.new_empty(num_tokens, top_k + num_dense, dim)
    # As many rows to a block as there are slots: a block for each expert.
    sorted_slots, blocks = dispatch_reference(chosen_TA, len(down_EDF), chosen_TA.numel())
    for expert, first, end in blocks.tolist():
        if expert >= 0:
            slots = sorted_slots[first:end].long()
            tokens = slots // top_k
            gate_up = F.linear(x_routed_TD[tokens], gate_up_EFD[expert])
            hidden = gelu_times_reference(*gate_up.chunk(2, -1))
            y_TXD[tokens, slots % top_k] = F.linear(hidden, down_EDF[expert])
    if dense_down_DF is not None and x_dense_TD is not None and dense_gate_up_FD is not None:
        hidden_TF = gelu_times_reference(*F.linear(x_dense_TD, dense_gate_up_FD).chunk(2, -1))
        parts = zip(hidden_TF.split(width, 1), dense_down_DF.split(width, 1), strict=True)
        for i, (part_TF, part_DF) in enumerate(parts):
            y_TXD[:, top_k + i] = F.linear(part_TF, part_DF)
    return y_TXD


def _block_m(num_tokens: int, top_k: int, num_experts: int, has_dense: bool) -> int:
    """Twice the rows of an average expert, and room for all rows of a pseudo-expert."""
    rows = 2 * num_tokens * top_k // num_experts if num_tokens > _MAX_UNSORTED else 1
    if has_dense:
        rows = max(rows, num_tokens)
    power: int = triton.next_power_of_2(rows)
    return min(max(power, 16), 128)


def moe_mlp(
    x_routed_TD: Tensor,
    x_dense_TD: Tensor | None,
    chosen_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    dense_gate_up_FD: Tensor | None,
    dense_down_DF: Tensor | None,
) -> Tensor:
    """Unweighted rows y_TXD. The three `dense` tensors are given together or not at all.

    On a GPU they are for at most MAX_DENSE_TOKENS tokens.
    """
    weights = (gate_up_EFD, down_EDF, dense_gate_up_FD, dense_down_DF)
    if not runs_triton(x_routed_TD):
        return moe_mlp_reference(x_routed_TD, x_dense_TD, chosen_TA, *weights)
    assert x_routed_TD.stride(1) == 1 and chosen_TA.is_contiguous()
    assert all(weight is None or weight.is_contiguous() for weight in weights)
    if dense_down_DF is None or dense_gate_up_FD is None or x_dense_TD is None:
        # Never read, as there is no pseudo-expert.
        dense = (x_routed_TD, gate_up_EFD, down_EDF)
        return _launch(x_routed_TD, chosen_TA, gate_up_EFD, down_EDF, *dense, num_dense=0)
    num_dense, rest = divmod(dense_down_DF.shape[1], down_EDF.shape[2])
    assert rest == 0 and len(x_dense_TD) <= MAX_DENSE_TOKENS and x_dense_TD.stride(1) == 1
    dense = (x_dense_TD, dense_gate_up_FD, dense_down_DF)
    return _launch(x_routed_TD, chosen_TA, gate_up_EFD, down_EDF, *dense, num_dense=num_dense)


def _launch(
    x_routed_TD: Tensor,
    chosen_TA: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    x_dense_TD: Tensor,
    dense_gate_up_FD: Tensor,
    dense_down_DF: Tensor,
    num_dense: int,
) -> Tensor:
    (num_tokens, top_k), (num_experts, dim, width) = chosen_TA.shape, down_EDF.shape
    block_m = _block_m(num_tokens, top_k, num_experts, num_dense > 0)
    num_routed, sorted_slots_N, blocks_M3 = num_tokens * top_k, None, None
    if num_tokens > _MAX_UNSORTED:
        sorted_slots_N, blocks_M3 = dispatch(chosen_TA, num_experts, block_m)
        num_routed = len(blocks_M3)
    hidden_RF = x_routed_TD.new_empty(num_tokens * (top_k + num_dense), width)
    y_TXD = x_routed_TD.new_empty(num_tokens, top_k + num_dense, dim)

    options = {"TOP_K": top_k, **tile_options(block_m, x_routed_TD.element_size())}
    rows = (chosen_TA, sorted_slots_N, blocks_M3, num_tokens, num_routed, num_dense, num_experts)
    num_m = num_routed + num_dense
    gate_up_kernel[(num_m * triton.cdiv(2 * width, options["BLOCK_N"]),)](
        x_routed_TD,
        x_dense_TD,
        gate_up_EFD,
        dense_gate_up_FD,
        hidden_RF,
        *rows,
        dim,
        width,
        x_routed_TD.stride(0),
        x_dense_TD.stride(0),
        EVEN_K=dim % options["BLOCK_K"] == 0,
        **options,
    )
    down_kernel[(num_m * triton.cdiv(dim, options["BLOCK_N"]),)](
        hidden_RF,
        down_EDF,
        dense_down_DF,
        y_TXD,
        *rows,
        dim,
        width,
        EVEN_K=width % options["BLOCK_K"] == 0,
        **options,
    )
    return y_TXD
