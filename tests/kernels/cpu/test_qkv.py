"""Head norms, RoPE and cache writes on CPUs equal their references in float32, rounded once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bezel.kernels.cpu.jit import plain_torch
from bezel.kernels.kv_pages import NO_SLOT, write_kv
from bezel.kernels.qkv import QKVShape, rotate_and_store_global, rotate_and_store_local
from bezel.kernels.rotary import rotary_frequencies, rotary_table

EPS = 1e-6
HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


pytestmark = pytest.mark.usefixtures("three_threads")


@dataclass(frozen=True)
class Step:
    """`num_stored` is None in a global layer."""

    shape: QKVShape
    num_pairs: int
    slots: tuple[int, ...] = (9, NO_SLOT, 0, 15, 4, NO_SLOT)
    num_stored: int | None = None
    owns_kv: bool = True
    page_size: int = 4

    @property
    def width(self) -> int:
        return self.shape.head_dim + 2 * self.num_pairs * self.shape.key_is_value

    def projection(self, dtype: torch.dtype) -> Tensor:
        """Heads of quite different sizes, and NaN between tokens."""
        kinds = 0 if not self.owns_kv else 1 if self.shape.key_is_value else 2
        num_heads = self.shape.num_heads + kinds * self.shape.num_kv_heads
        values = num_heads * self.shape.head_dim
        x_TN = torch.full((len(self.slots), values + 16), torch.nan, dtype=dtype)[:, :values]
        x_TNK = x_TN.unflatten(1, (num_heads, self.shape.head_dim))
        generator = torch.Generator().manual_seed(0)
        sizes_N1 = torch.logspace(-3, 1, num_heads)[:, None]
        return x_TNK.copy_(torch.randn(x_TNK.shape, generator=generator) * sizes_N1)


LOCAL = Step(QKVShape(3, 2, 64, True, False), 32, num_stored=4)
STEPS = {
    "local": LOCAL,
    "gemma-3": replace(LOCAL, shape=QKVShape(4, 1, 256, False, False), num_pairs=128),
    "no-chunk": replace(LOCAL, num_stored=6),
    "no-decode": replace(LOCAL, num_stored=0),
    "shared": replace(LOCAL, owns_kv=False),
    "global": Step(QKVShape(4, 3, 128, True, False), 16),
    "global-shared": Step(QKVShape(4, 3, 128, True, False), 16, owns_kv=False),
    "packed": Step(QKVShape(3, 2, 128, True, True), 16),
    "packed-shared": Step(QKVShape(3, 2, 128, True, True), 16, owns_kv=False),
    "one-token": replace(LOCAL, slots=(5,), num_stored=1),
    "no-token": replace(LOCAL, slots=(), num_stored=0),
    "threads": replace(
        LOCAL,
        shape=QKVShape(8, 2, 256, True, False),
        num_pairs=128,
        slots=(*range(10, 30), NO_SLOT),
        num_stored=11,
    ),
    "packed-threads": Step(QKVShape(8, 1, 512, True, True), 64, (*range(30, 48), NO_SLOT, 0)),
}


def call(step: Step, x_TNK: Tensor, pages: Any) -> tuple[Tensor | None, ...]:
    head_dim = step.shape.head_dim
    q_weight_K, k_weight_K = torch.rand(2, head_dim, generator=torch.Generator().manual_seed(1))
    frequencies = rotary_frequencies(1e4, head_dim, step.num_pairs, 1.0)
    rotary = rotary_table(torch.arange(len(x_TNK)) * 7, frequencies)
    caches, slots_T = (pages.k_cache_PBGC, pages.v_cache_PBGK), torch.tensor(step.slots).long()
    arguments = (x_TNK, step.shape, EPS, q_weight_K)
    if step.num_stored is None:
        keys = (k_weight_K, *rotary, *caches, slots_T)
        return (rotate_and_store_global(*arguments, *keys, step.owns_kv),)
    keys = (k_weight_K if step.owns_kv else None, *rotary, *caches, slots_T)
    return rotate_and_store_local(*arguments, *keys, step.num_stored)


def tensors(results: tuple[Tensor | None, ...], pages: Any) -> Iterator[Tensor | None]:
    yield from results
    yield pages.k_cache_PBGC
    yield pages.v_cache_PBGK


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_any_step(make_pages: Callable[..., Any], step: Step, dtype: torch.dtype) -> None:
    """All results and the whole of the caches, NaN where nothing was stored."""

    def pages(dtype: torch.dtype) -> Any:
        shape = (15, step.page_size, step.shape.num_kv_heads, step.width)
        return make_pages(*shape, packed=step.shape.key_is_value, dtype=dtype)

    x_TNK, actual, expected = step.projection(dtype), pages(dtype), pages(torch.float32)
    results = call(step, x_TNK, actual)
    with plain_torch():
        expected_results = call(step, x_TNK.float(), expected)
    for x, reference in zip(
        tensors(results, actual), tensors(expected_results, expected), strict=True
    ):
        if x is None or reference is None:
            assert x is reference
            continue
        assert x.dtype == dtype
        rtol = HALF_UNIT[dtype] + 1e-5
        torch.testing.assert_close(x.float(), reference, rtol=rtol, atol=2e-6, equal_nan=True)


def test_a_token_does_not_depend_on_the_others(make_pages: Callable[..., Any]) -> None:
    """Nor on the thread that computes it."""
    step = STEPS["threads"]
    x_TNK = step.projection(torch.bfloat16)
    pages = make_pages(15, step.page_size, 2, 256, dtype=torch.bfloat16)
    q_THK, _, v_TGK = call(step, x_TNK, pages)
    x_TNK[1:12] = torch.nan
    again_THK, _, again_TGK = call(step, x_TNK, pages)
    assert q_THK is not None and v_TGK is not None and again_THK is not None
    assert torch.equal(again_THK[12:], q_THK[12:]) and torch.equal(again_THK[0], q_THK[0])
    assert again_TGK is not None and torch.equal(again_TGK[1:], v_TGK[1:])
    alone = replace(step, slots=step.slots[:1], num_stored=1)
    assert torch.equal(call(alone, x_TNK[:1], pages)[0], q_THK[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 300])
@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_write_kv(make_pages: Callable[..., Any], num_tokens: int, dtype: torch.dtype) -> None:
    """Rows of a wider tensor, in slots in any order."""
    actual, expected = (make_pages(90, 4, 2, 128, dtype=dtype) for _ in range(2))
    fused_TNK = torch.randn(num_tokens, 6, 128).to(dtype)
    slots_T = torch.randperm(360, generator=torch.Generator().manual_seed(0))[:num_tokens]
    slots_T[1::3] = NO_SLOT
    write_kv(fused_TNK[:, 4:], actual.v_cache_PBGK, slots_T)
    with plain_torch():
        write_kv(fused_TNK[:, 4:], expected.v_cache_PBGK, slots_T)
    torch.testing.assert_close(
        actual.v_cache_PBGK, expected.v_cache_PBGK, rtol=0, atol=0, equal_nan=True
    )
    assert actual.k_cache_PBGC.isnan().all()
