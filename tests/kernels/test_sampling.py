"""Sampling: what may be drawn, how often, and that a draw is a function of its own row only."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bezel.kernels import sampling
from bezel.kernels.gumbel import gumbel, noise_key
from bezel.kernels.sampling import sample


def draw(logits_SV: Tensor, **options: Any) -> Tensor:
    """`sample` with neutral defaults; a number stands for a column of it."""
    defaults: dict[str, Any] = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    options = defaults | dict(seed=0, position=0) | options
    columns = {
        name: torch.as_tensor(value).expand(len(logits_SV)).tolist()
        for name, value in options.items()
    }
    return sample(logits_SV, **columns)


def draws(logits_V: list[float], num_draws: int, **options: Any) -> Counter[int]:
    """How often each token comes out of `num_draws` rows with seeds of their own."""
    rows = torch.tensor([logits_V]).expand(num_draws, -1).contiguous()
    return Counter(draw(rows, seed=torch.arange(num_draws), **options).tolist())


def allowed(
    logits_V: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """The tokens that survive and their probabilities, one cut after the other on a sorted list."""
    logits = np.asarray(logits_V, dtype=np.float64) / temperature
    order = np.argsort(-logits, kind="stable")
    order = order[: top_k or len(order)]
    p = np.exp(logits[order] - logits.max())
    p /= p.sum()
    if top_p < 1:
        needed = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:needed], p[:needed]
    kept = p >= min_p * p.max()
    order, p = order[kept], p[kept]
    return dict(zip(order.tolist(), (p / p.sum()).tolist(), strict=True))


# Twelve tokens, out of order, the rarest a seventieth as likely as the likeliest.
LOGITS = [0.3, 2.1, -1.4, 1.7, 0.9, -0.2, 2.8, -0.9, 1.2, 0.1, -0.6, 2.4]
CUTS = [
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=12),
    dict(top_k=100),
    dict(top_p=0.5),
    dict(top_p=0.95),
    dict(top_p=0.01),
    dict(min_p=0.1),
    dict(min_p=0.5),
    dict(min_p=1.0),
    dict(top_k=6, top_p=0.6),
    dict(top_k=100, top_p=0.8),
    dict(top_k=4, top_p=0.99, min_p=0.6),
    dict(top_p=0.9, min_p=0.3),
    dict(top_k=8, top_p=0.9, min_p=0.05, temperature=1.8),
    dict(top_p=0.9, temperature=0.5),
    dict(min_p=0.05, temperature=0.6),
]


def cut_name(cut: dict[str, float]) -> str:
    return ",".join(f"{name}={value}" for name, value in cut.items())


def chi_square(counts: Counter[int], probabilities: dict[int, float]) -> float:
    total = sum(counts.values())
    return sum((counts[t] - total * p) ** 2 / (total * p) for t, p in probabilities.items())


def test_temperature_0_takes_the_largest_logit_and_the_first_of_equals() -> None:
    logits_SV = torch.tensor([[0.0, 3.0, 1.0, 3.0], [-1.0, -5.0, -2.0, -1.5]])
    assert draw(logits_SV, temperature=0.0, seed=[1, 2]).tolist() == [1, 0]


@pytest.mark.parametrize("cut", CUTS, ids=cut_name)
def test_exactly_the_tokens_of_the_cut_are_drawn_as_often_as_they_should(
    cut: dict[str, Any],
) -> None:
    options = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | cut
    expected = allowed(LOGITS, **options)
    counts = draws(LOGITS, 6_000, **options)
    assert set(counts) == set(expected)
    if len(expected) > 1:
        degrees = len(expected) - 1
        # Wilson and Hilferty's approximation of the quantile that 1 in 10,000 exceeds.
        limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
        assert chi_square(counts, expected) < limit


@pytest.mark.parametrize("limit", [1, 1024])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_largest_sum_of_logit_and_noise_wins(
    monkeypatch: pytest.MonkeyPatch, limit: int, top_p: float
) -> None:
    """Whether only the first k of a row are sorted, as while k is small, or the whole row."""
    monkeypatch.setattr(sampling, "MAX_TOP_K", limit)
    logits_SV = torch.randn(100, 300, generator=torch.Generator().manual_seed(2))
    tokens = draw(logits_SV, top_k=5, top_p=top_p, seed=torch.arange(100))
    for row, token in enumerate(tokens.tolist()):
        kept = allowed(logits_SV[row].tolist(), 1.0, 5, top_p, 0.0)
        key = noise_key(torch.tensor([row]), torch.tensor([0]))
        noise = gumbel(key, torch.arange(300)[None])[0]
        assert token == max(kept, key=lambda t: float(logits_SV[row, t] + noise[t]))


@pytest.mark.parametrize("top_p", [1e-9, 0.0])
def test_a_tiny_top_p_keeps_the_likeliest(top_p: float) -> None:
    assert set(draws([0.0, 0.1, 0.0], 200, top_p=top_p)) == {1}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    """Of four equals 0.5 is two; of the two that top_k leaves it is one."""
    assert len(draws([1.0, 1.0, 1.0, 1.0], 500, top_p=0.5)) == 2
    assert len(draws([1.0, 1.0, 1.0, 1.0], 500, top_k=2, top_p=0.5)) == 1


def test_min_p_compares_with_the_largest_after_temperature() -> None:
    """exp(−2) = 0.135 of the largest; at temperature 2 exp(−1) = 0.368."""
    assert set(draws([2.0, 0.0], 500, min_p=0.2)) == {0}
    assert set(draws([2.0, 0.0], 500, min_p=0.2, temperature=2.0)) == {0, 1}


def test_tokens_at_minus_infinity_are_never_drawn() -> None:
    logits = [0.0, -math.inf, 0.0, -math.inf]
    for cut in (dict(), dict(top_k=3), dict(top_p=0.99), dict(min_p=1e-6), dict(top_k=4)):
        assert set(draws(logits, 500, **cut)) == {0, 2}


def test_equal_logits_are_drawn_equally_often() -> None:
    counts = draws([0.0] * 10, 50_000)
    assert chi_square(counts, dict.fromkeys(range(10), 0.1)) < 33.7  # 9 degrees, 1 in 10,000


def test_the_same_seed_and_position_draw_the_same_again() -> None:
    logits_SV = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.arange(64), torch.arange(64) * 7
    tokens = draw(logits_SV, seed=seeds, position=positions)
    assert torch.equal(draw(logits_SV, seed=seeds, position=positions), tokens)
    assert not torch.equal(draw(logits_SV, seed=seeds + 1, position=positions), tokens)
    assert not torch.equal(draw(logits_SV, seed=seeds, position=positions + 1), tokens)


def test_rows_of_all_kinds_draw_what_each_draws_alone() -> None:
    """Greedy, uncut, partly and fully sorted rows in one batch, in two orders. Logits as of a
    bfloat16 model, with many equal ones where the cuts fall."""
    kinds = list(
        itertools.product(
            (0.0, 0.7),
            (0, 1, 5, 64, 65, 1024, 1025, 1499, 5000),
            (1.0, 0.9, 1e-6),
            (0.0, 0.01),
        )
    )
    generator = torch.Generator().manual_seed(4)
    columns = dict(
        zip(
            ("temperature", "top_k", "top_p", "min_p"),
            map(torch.tensor, zip(*kinds, strict=True)),
            strict=True,
        ),
        seed=torch.randint(-(2**62), 2**62, (len(kinds),), generator=generator),
        position=torch.randint(0, 2**17, (len(kinds),), generator=generator),
    )
    logits_SV = (torch.randn(len(kinds), 1500, generator=generator) * 2).bfloat16().float()

    def of(rows: Tensor) -> Tensor:
        return draw(logits_SV[rows], **{name: x[rows] for name, x in columns.items()})

    together = of(torch.arange(len(kinds)))
    order = torch.randperm(len(kinds), generator=generator)
    assert torch.equal(of(order), together[order])
    alone = torch.cat([of(torch.tensor([row])) for row in range(len(kinds))])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("mates_top_k", [[], [8], [20], [900]])
def test_equal_logits_at_the_cut_do_not_depend_on_batch_mates(mates_top_k: list[int]) -> None:
    """Twenty equal logits of which top_k keeps five: always the first five."""
    num_mates = len(mates_top_k)
    logits_SV = torch.zeros(1 + num_mates, 20)
    kept = {
        draw(logits_SV, top_k=[5, *mates_top_k], seed=[seed] * (1 + num_mates))[0].item()
        for seed in range(200)
    }
    assert kept == {0, 1, 2, 3, 4}


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    """Pairs of draws at (seed, p) and (seed, p + 1), and at (seed, p) and (seed + 1, p)."""
    logits_SV = torch.zeros(40_000, 4)
    seeds = torch.arange(40_000)
    first = draw(logits_SV, seed=seeds, position=5)
    for second in (
        draw(logits_SV, seed=seeds, position=6),
        draw(logits_SV, seed=seeds + 1, position=5),
    ):
        pairs = Counter((first * 4 + second).tolist())
        assert chi_square(pairs, dict.fromkeys(range(16), 1 / 16)) < 44.3  # 15 degrees, 1 in 10,000


@pytest.mark.parametrize("cut", [dict(), dict(top_k=5), dict(top_p=0.5), dict(min_p=0.5)])
def test_a_row_of_nan_gives_some_token_and_harms_no_other(cut: dict[str, Any]) -> None:
    """One row at a time, as with a whole vocabulary, and together."""
    logits_SV = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    expected = draw(logits_SV, seed=[1, 2, 3], **cut).tolist()
    logits_SV[1] = torch.nan
    tokens = draw(logits_SV, seed=[1, 2, 3], **cut).tolist()
    assert (tokens[0], tokens[2]) == (expected[0], expected[2])
    assert 0 <= tokens[1] < 300
    assert 0 <= draw(logits_SV[1:2], **cut).item() < 300


@pytest.mark.parametrize("top_k", [0, 3, 2000])
def test_of_equal_logits_the_first_reach_top_p(top_k: int) -> None:
    """Four tokens share the largest logit; half of them, and of three of them, are two."""
    logits = torch.full((200, 3000), -math.inf)
    logits[:, [70, 900, 2040, 2999]] = 1.0
    drawn = draw(logits, top_k=top_k, top_p=0.5, seed=torch.arange(200))
    assert set(drawn.tolist()) == {70, 900}


def test_logits_of_any_float_dtype_are_taken() -> None:
    logits_SV = torch.randn(40, 300, generator=torch.Generator().manual_seed(3)).bfloat16()
    for cut in (dict(), dict(top_k=9, top_p=0.8), dict(top_p=0.8)):
        tokens = draw(logits_SV, seed=torch.arange(40), **cut)
        assert torch.equal(tokens, draw(logits_SV.float(), seed=torch.arange(40), **cut))


def test_no_rows_give_no_tokens() -> None:
    assert draw(torch.empty(0, 300)).tolist() == []
