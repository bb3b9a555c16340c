"""Calls of Gemma's experts, for `kernels.py` to time; see kernel_cases.py.

T tokens   D model width   F expert width   E experts   A experts per token   X = A + dense rows
"""

from collections.abc import Iterator
from functools import partial

import torch
from kernel_cases import DTYPE, EPS, Case, Stock, Work, num_bytes, worst_error
from torch import Tensor
from torch.nn import functional as F

from bezel.engine.model_config import ModelConfig, MoEConfig
from bezel.kernels.gelu_mul import gelu_times_reference
from bezel.kernels.moe_combine import combine_experts, combine_experts_reference
from bezel.kernels.moe_mlp import MAX_DENSE_TOKENS, moe_mlp
from bezel.kernels.moe_route import route, route_reference

TOKENS = [1, 4, 16, 64, 512, 4096]


def expert_cases(models: dict[str, ModelConfig]) -> Iterator[Case]:
    for name, model in models.items():
        if model.moe is None:
            continue
        dim, dense_width = model.hidden_size, model.layers[0].intermediate_size
        for tokens in TOKENS:
            sizes, rows = {"tokens": tokens}, {"num_tokens": tokens, "moe": model.moe}
            widths = {"dim": dim, "dense_width": dense_width}
            yield Case("route", name, sizes, partial(routing, **rows))
            yield Case("moe_mlp", name, sizes, partial(experts, **rows, **widths))
            yield Case("combine_experts", name, sizes, partial(combination, **rows, **widths))


def routing(stock: Stock, num_tokens: int, moe: MoEConfig) -> Work:
    scores, scale = stock.normal(num_tokens, moe.num_experts), stock.normal(moe.num_experts)
    run = partial(route, scores, scale, moe.top_k)
    baseline = partial(route_reference, scores, scale, moe.top_k)

    def error() -> float:
        chosen, weights = run()
        expected_chosen, expected_weights = baseline()
        same = torch.equal(chosen.long(), expected_chosen.long())
        return worst_error([weights], [expected_weights]) if same else float("inf")

    chosen_bytes = num_tokens * moe.top_k * (4 + 4)
    return Work(run, error, num_bytes(scores, scale) + chosen_bytes, baseline=baseline)


def experts(stock: Stock, num_tokens: int, moe: MoEConfig, dim: int, dense_width: int) -> Work:
    """Experts are chosen at random, all alike. Small steps have the dense MLP with them."""
    num_experts, width, top_k = moe.num_experts, moe.intermediate_size, moe.top_k
    x_TD = stock.normal(num_tokens, dim)
    chosen_TA = stock.normal(num_tokens, num_experts).topk(top_k).indices.int()
    gate_up = stock.normal(num_experts, 2 * width, dim, std=dim**-0.5)
    down = stock.normal(num_experts, dim, width, std=width**-0.5)
    dense: list[Tensor | None] = [None, None, None]
    if num_tokens <= MAX_DENSE_TOKENS:
        dense_down = stock.normal(dim, dense_width, std=width**-0.5)
        dense_gate_up = stock.normal(2 * dense_width, dim, std=dim**-0.5)
        dense = [stock.normal(num_tokens, dim), dense_gate_up, dense_down]
    num_dense = dense_width // width if dense[0] is not None else 0
    run = partial(moe_mlp, x_TD, dense[0], chosen_TA, gate_up, down, dense[1], dense[2])
    slots = [(chosen_TA == expert).nonzero(as_tuple=True) for expert in range(num_experts)]
    used = [(expert, *own) for expert, own in enumerate(slots) if len(own[0])]

    def expert_by_expert() -> Tensor:
        y_TXD = x_TD.new_empty(num_tokens, top_k + num_dense, dim)
        for expert, tokens, choices in used:
            hidden = gelu_times_reference(*F.linear(x_TD[tokens], gate_up[expert]).chunk(2, -1))
            y_TXD[tokens, choices] = F.linear(hidden, down[expert])
        if num_dense:
            hidden = gelu_times_reference(*F.linear(dense[0], dense[1]).chunk(2, -1))
            for i, part in enumerate(hidden.split(width, 1)):
                y_TXD[:, top_k + i] = F.linear(part, dense[2][:, i * width : (i + 1) * width])
        return y_TXD

    def error() -> float:
        return worst_error([run()], [expert_by_expert()])

    weights = len(used) * 3 * width * dim * DTYPE.itemsize + num_bytes(dense[1], dense[2])
    rows = num_tokens * (top_k + num_dense)
    moved = weights + num_bytes(x_TD, chosen_TA, dense[0]) + rows * dim * DTYPE.itemsize
    return Work(run, error, moved, rows * 6 * width * dim, expert_by_expert)


def combination(stock: Stock, num_tokens: int, moe: MoEConfig, dim: int, dense_width: int) -> Work:
    num_dense = dense_width // moe.intermediate_size if num_tokens <= MAX_DENSE_TOKENS else 0
    y_TXD = stock.normal(num_tokens, moe.top_k + num_dense, dim)
    weights_TA = stock.normal(num_tokens, moe.top_k, dtype=torch.float32).softmax(-1)
    dense_TD = None if num_dense else stock.normal(num_tokens, dim)
    *norms, next_D = (stock.weight(dim) for _ in range(4))
    residual_TD, scalar_1 = stock.normal(num_tokens, dim), stock.normal(1)
    rest = (EPS, scalar_1, next_D)
    run = partial(combine_experts, y_TXD, weights_TA, dense_TD, *norms, residual_TD, *rest)

    def torch_ops(dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor | None]:
        dense = None if dense_TD is None else dense_TD.to(dtype)
        y, residual = y_TXD.to(dtype), residual_TD.to(dtype)
        return combine_experts_reference(y, weights_TA, dense, *norms, residual, *rest)

    def error() -> float:
        return worst_error(run(), torch_ops(torch.float32))

    read = num_bytes(y_TXD, weights_TA, dense_TD, *norms, residual_TD, scalar_1, next_D)
    return Work(run, error, read + 2 * residual_TD.nbytes, baseline=torch_ops)
