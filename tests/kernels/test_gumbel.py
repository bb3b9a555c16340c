"""Gumbel noise: its distribution, and that all its inputs matter and nothing else does."""

import math

import torch
from torch import Tensor

from bezel.kernels.gumbel import NOISE_RANGE, gumbel, noise_key

EULER_GAMMA = 0.5772156649


def noise_of(seed_S: Tensor, position_S: Tensor, token_ids_SC: Tensor) -> Tensor:
    return gumbel(noise_key(seed_S, position_S), token_ids_SC)


def test_noise_stays_within_its_range() -> None:
    """At both ends of the numbers that the logarithms are taken of."""
    ends = -torch.log(-torch.log((torch.tensor([0.0, 2.0**23 - 1]) + 0.5) * 2.0**-23))
    assert ends.isfinite().all()
    assert ends[1] - ends[0] < NOISE_RANGE


def test_gumbel_has_mean_and_variance_of_its_distribution() -> None:
    num_rows, vocab_size = 4, 262_144
    noise = noise_of(
        torch.tensor([0, 1, -1, 2**62]),
        torch.tensor([0, 0, 12, 131_071]),
        torch.arange(vocab_size).expand(num_rows, -1),
    )
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    variance = math.pi**2 / 6
    # Four standard errors; the fourth moment of the distribution is 5.4 times its variance squared.
    for row in noise.double():
        assert abs(row.mean() - EULER_GAMMA) < 4 * math.sqrt(variance / vocab_size)
        assert abs(row.var() - variance) < 4 * variance * math.sqrt(4.4 / vocab_size)


def test_gumbel_rows_tokens_and_positions_are_uncorrelated() -> None:
    tokens = torch.arange(262_144)[None]

    def noise(seed: int, position: int) -> Tensor:
        return noise_of(torch.tensor([seed]), torch.tensor([position]), tokens)[0]

    row = noise(1, 1)
    limit = 4 / math.sqrt(tokens.numel())
    for other in (row.roll(1), row.roll(64), noise(2, 1), noise(1, 2), noise(2, 2), noise(-1, 1)):
        assert abs(torch.corrcoef(torch.stack((row, other)))[0, 1]) < limit


def test_gumbel_of_a_token_does_not_depend_on_which_others_are_asked_for() -> None:
    seed, position = torch.tensor([9]), torch.tensor([4])
    everything = noise_of(seed, position, torch.arange(1000)[None])[0]
    some = torch.tensor([[999, 3, 500, 0]])
    assert torch.equal(noise_of(seed, position, some)[0], everything[some[0]])


def test_gumbel_uses_all_bits_of_its_key() -> None:
    """Of 300,000 keys cut to 32 bits about ten would share their noise with another."""
    num_rows = 300_000
    tokens = torch.arange(4).expand(num_rows, -1)
    for seeds, positions in (
        (torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.int64)),
        (torch.arange(num_rows) << 32, torch.arange(num_rows)),
    ):
        noise = noise_of(seeds, positions, tokens)
        assert len(torch.unique(noise, dim=0)) == num_rows
