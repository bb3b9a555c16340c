"""Sampling, log-probabilities and masks on CPUs: what the references say, row by row."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bezel.kernels.cpu.jit import plain_torch, runs_numba
from bezel.kernels.logprobs import logprobs
from bezel.kernels.sampling import sample
from bezel.kernels.token_mask import apply_token_mask

CUTS: list[dict[str, Any]] = [
    dict(temperature=0.0),
    dict(),
    dict(temperature=0.3),
    dict(min_p=0.2),
    dict(top_k=1),
    dict(top_k=40),
    dict(top_k=40, top_p=0.8, min_p=0.02),
    dict(top_k=1200, top_p=0.9),
    dict(top_k=3000),
    dict(top_p=0.9),
    dict(top_p=0.5, temperature=1.7),
    dict(top_p=0.999, min_p=0.001),
    dict(top_p=0.0),
]
# Rows of several chunks, the last one and its last block incomplete; and of less than a block.
SIZES = [16 * 1024 * 2 + 256 * 3 + 48, 32]


def name_of(cut: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in cut.items()) or "uncut"


def draw(logits_SV: Tensor, seeds: list[int], **cut: Any) -> list[int]:
    options = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | cut
    columns = {name: [value] * len(seeds) for name, value in options.items()}
    positions = [3 * seed % 101 for seed in range(len(seeds))]
    tokens: list[int] = sample(logits_SV, **columns, seed=seeds, position=positions).tolist()
    return tokens


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Rows from flat to peaked; rounded as bfloat16 models' are, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits_SV = torch.randn(num_rows, vocab_size, generator=generator)
    return (logits_SV * torch.linspace(0.1, 5, num_rows)[:, None]).bfloat16().float()


@pytest.mark.parametrize("cut", CUTS, ids=name_of)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_every_row_draws_the_token_of_the_reference(vocab_size: int, cut: dict[str, Any]) -> None:
    logits_SV = random_logits(24, vocab_size)
    seeds = [(-1) ** i * (7919 * i + 2**61 * (i % 2)) for i in range(24)]
    assert runs_numba(logits_SV, vocab_size)
    with plain_torch():
        expected = draw(logits_SV, seeds, **cut)
    assert draw(logits_SV, seeds, **cut) == expected


@pytest.mark.parametrize("cut", CUTS, ids=name_of)
def test_a_row_draws_the_same_alone_and_on_any_number_of_threads(cut: dict[str, Any]) -> None:
    logits_SV, seeds = random_logits(5, SIZES[0], seed=1), [5, 4, 3, 2, 1]
    together = draw(logits_SV, seeds, **cut)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1 if num_threads > 1 else 2)
    try:
        assert draw(logits_SV, seeds, **cut) == together
    finally:
        torch.set_num_threads(num_threads)
    assert draw(logits_SV[:1], seeds[:1], **cut) == together[:1]


@pytest.mark.parametrize("cut", [dict(), dict(top_k=64), dict(top_p=0.95), dict(temperature=0.0)])
def test_bfloat16_logits_and_rows_apart_from_each_other_draw_the_same(cut: dict[str, Any]) -> None:
    logits_SV, seeds = random_logits(6, 4096), [1, 2, 3, 4, 5, 6]
    expected = draw(logits_SV, seeds, **cut)
    assert draw(logits_SV.bfloat16(), seeds, **cut) == expected
    wide_SV = torch.full((6, 8192), 99.0)
    wide_SV[:, :4096] = logits_SV
    assert draw(wide_SV[:, :4096], seeds, **cut) == expected


@pytest.mark.parametrize("cut", CUTS, ids=name_of)
def test_masked_tokens_are_never_drawn(cut: dict[str, Any]) -> None:
    """Three tokens are left, fewer than top_k, in three blocks."""
    logits_SV = torch.full((60, 1024), -math.inf)
    logits_SV[:, [70, 300, 1023]] = torch.tensor([1.0, 1.2, 1.1])
    with plain_torch():
        expected = draw(logits_SV, list(range(60)), **cut)
    assert draw(logits_SV, list(range(60)), **cut) == expected
    assert set(expected) <= {70, 300, 1023}


@pytest.mark.parametrize("cut", CUTS, ids=name_of)
def test_equal_logits_are_kept_in_the_order_of_their_ids(cut: dict[str, Any]) -> None:
    logits_SV = torch.zeros(100, 4096)
    logits_SV[:, ::7] = -0.0
    with plain_torch():
        expected = draw(logits_SV, list(range(100)), **cut)
    assert draw(logits_SV, list(range(100)), **cut) == expected


@pytest.mark.parametrize("cut", CUTS, ids=name_of)
def test_nan_is_never_drawn_and_a_row_of_it_harms_no_other(cut: dict[str, Any]) -> None:
    logits_SV = random_logits(4, 4096)
    blank_SV = logits_SV.clone()
    blank_SV[:, 5::9] = -math.inf
    expected = draw(blank_SV, [1, 2, 3, 4], **cut)
    logits_SV[:, 5::9] = math.nan
    logits_SV[2] = math.nan
    tokens = draw(logits_SV, [1, 2, 3, 4], **cut)
    assert [tokens[i] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]
    assert 0 <= tokens[2] < 4096


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-40, 40, width=16), min_size=32, max_size=32),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 40),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_parameters_draw_what_the_reference_draws(
    values: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
) -> None:
    logits_SV = torch.tensor([values])
    cut = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with plain_torch():
        expected = draw(logits_SV, [seed], **cut)
    assert draw(logits_SV, [seed], **cut) == expected


@pytest.mark.parametrize("num_top", [0, 1, 20, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_reference(num_top: int, dtype: torch.dtype) -> None:
    logits_NV = random_logits(7, SIZES[0]).to(dtype)
    token_ids_N = torch.arange(7) * 4001
    with plain_torch():
        expected = logprobs(logits_NV, token_ids_N, num_top)
    chosen_N, values_NM, ids_NM = logprobs(logits_NV, token_ids_N, num_top)
    torch.testing.assert_close(chosen_N, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values_NM, expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(ids_NM, expected[2])


def test_log_probabilities_of_fewer_finite_logits_than_are_asked_for() -> None:
    logits_NV = torch.full((1, 64), -math.inf)
    logits_NV[0, [40, 3]] = torch.tensor([2.0, 2.0])
    chosen_N, values_NM, ids_NM = logprobs(logits_NV, torch.tensor([0]), 5)
    assert chosen_N.tolist() == [-math.inf]
    assert ids_NM.tolist() == [[3, 40, 0, 1, 2]]
    torch.testing.assert_close(values_NM[0, :2], torch.full((2,), -math.log(2)))
    assert values_NM[0, 2:].tolist() == [-math.inf] * 3


@pytest.mark.parametrize("vocab_size", [16, 48, 4096, 40_000])
def test_masks_forbid_what_the_reference_forbids(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits_NV = torch.randn(5, vocab_size, generator=generator)
    shape = (4, -(-vocab_size // 32))
    mask_MW = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
    mask_MW[0], mask_MW[1, ::2] = -1, 0
    rows_M, expected_NV = torch.tensor([4, 0, -1, 3]), logits_NV.clone()
    with plain_torch():
        apply_token_mask(expected_NV, rows_M, mask_MW)
    apply_token_mask(logits_NV, rows_M, mask_MW)
    assert torch.equal(logits_NV, expected_NV)
