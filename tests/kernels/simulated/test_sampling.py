"""The drawing kernels, interpreted: the reference's tokens for all cuts, ties and odd rows."""

import itertools
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.mutation import mutated
from simulator.watch import KernelBug, watched
from torch import Tensor

from bezel.kernels import candidates, draw, gumbel, sampling
from bezel.kernels.jit import triton_on_cpu

# Blocks, columns and lists of a vocabulary of a thousand, as many as a real one has.
SMALL = dict(NUM_COLUMNS=256, BLOCK_COLUMNS=64, SLOTS=32, CHUNK=512, MAX_TOP_K=100, BLOCK_V=512)
MODULES = (sampling, draw, candidates)


def shrink(patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    for module, (name, value) in itertools.product(modules, SMALL.items()):
        if hasattr(module, name):
            patch.setattr(module, name, value)


@pytest.fixture(autouse=True, scope="module")
def small() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, *MODULES)
        yield


def rows_of(kinds: list[tuple[float, int, float, float]], seed: int = 5) -> dict[str, list[Any]]:
    """Columns of (temperature, top_k, top_p, min_p), and of seeds and positions, all different."""
    temperature, top_k, top_p, min_p = map(list, zip(*kinds, strict=True))
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (len(kinds),), generator=generator).tolist()
    positions = torch.randint(0, 2**17, (len(kinds),), generator=generator).tolist()
    return dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seeds,
        position=positions,
    )


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows with NaN between them; in bfloat16 many logits are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits_SV = torch.full((num_rows, vocab_size + 3), torch.nan, dtype=dtype)[:, :vocab_size]
    return logits_SV.copy_(torch.randn(num_rows, vocab_size, generator=generator) * 2)


def by_kernels(logits_SV: Tensor, columns: dict[str, list[Any]]) -> list[int]:
    with watched(), triton_on_cpu():
        tokens: list[int] = sampling.sample(logits_SV, **columns).tolist()
    return tokens


def check_against_reference(logits_SV: Tensor, columns: dict[str, list[Any]]) -> None:
    assert by_kernels(logits_SV, columns) == sampling.sample(logits_SV, **columns).tolist()


@pytest.mark.parametrize(
    ("top_p", "dtype"),
    [
        (1.0, torch.float32),
        (0.9, torch.bfloat16),
        (0.5, torch.float16),
        (1e-6, torch.float32),
        (0.0, torch.bfloat16),
    ],
)
def test_every_combination_of_cuts(top_p: float, dtype: torch.dtype) -> None:
    """Greedy rows, lists and whole rows in one batch; V is no multiple of anything."""
    kinds = [
        (temperature, top_k, top_p, min_p)
        for temperature in (0.0, 0.7)
        for top_k in (0, 1, 64, 101, 998, 999, 1005)
        for min_p in (0.0, 0.05, 1.0)
        if temperature or not min_p
    ]
    check_against_reference(random_logits(len(kinds), 999, dtype), rows_of(kinds))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_few_different_logits(data: st.DataObject) -> None:
    """Ties wherever a cut may fall, tokens at −inf, lists that overflow, very few tokens."""
    vocab_size = data.draw(st.sampled_from([1, 2, 3, 31, 32, 33, 127, 128, 256, 257, 300, 513]))
    kinds = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from([0.0, 0.3, 1.0, 2.0]),
                st.sampled_from([0, 1, 2, 7, 50, 100, 101, 300]),
                st.sampled_from([1.0, 0.9137, 0.3173, 1e-9]),
                st.sampled_from([0.0, 0.0173, 0.4131]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    values = data.draw(
        st.lists(st.sampled_from([-torch.inf, -7.0, -0.0, 0.0, 1.0, 1.5, 9.0]), min_size=1)
    )
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, len(values), (len(kinds), vocab_size), generator=generator)
    logits_SV = torch.tensor(values)[which]
    logits_SV[:, vocab_size // 2] = 2.0
    check_against_reference(logits_SV, rows_of(kinds, seed))


CUTS: list[tuple[float, int, float, float]] = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 5, 1.0, 0.0),
    (1.0, 64, 0.9137, 0.1),
    (1.0, 500, 1.0, 0.0),
    (1.0, 0, 0.9137, 0.0),
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_all_logits_equal(cut: tuple[float, int, float, float]) -> None:
    check_against_reference(torch.zeros(4, 999), rows_of([cut] * 4))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_of_likely_tokens_that_huddle_in_few_columns_none_is_lost(
    cut: tuple[float, int, float, float],
) -> None:
    """The 256 columns hold tokens c, c + 256, …; here the likeliest are all of column 7 and 8."""
    logits_SV = torch.randn(4, 1500, generator=torch.Generator().manual_seed(1))
    logits_SV[:, 7::256] += 9.0
    logits_SV[:, 8::256] += 9.0
    check_against_reference(logits_SV, rows_of([cut] * 4))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_row_without_a_likely_token_gives_some_token_and_harms_no_other(
    cut: tuple[float, int, float, float], value: float
) -> None:
    logits_SV, columns = random_logits(3, 999, torch.float32), rows_of([cut] * 3)
    expected = sampling.sample(logits_SV, **columns).tolist()
    logits_SV[1] = value
    tokens = by_kernels(logits_SV, columns)
    assert (tokens[0], tokens[2]) == (expected[0], expected[2])
    assert 0 <= tokens[1] < 999


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_nan_among_numbers_is_never_drawn(cut: tuple[float, int, float, float]) -> None:
    logits_SV, columns = random_logits(3, 999, torch.float32), rows_of([cut] * 3)
    banned_SV = logits_SV.clone()
    banned_SV[:, ::2] = -torch.inf
    logits_SV[:, ::2] = torch.nan
    assert by_kernels(logits_SV, columns) == sampling.sample(banned_SV, **columns).tolist()


def test_rows_draw_with_mates_what_they_draw_alone() -> None:
    """In another order, too, which gives each row another place in its kind."""
    logits_SV = random_logits(2 * len(CUTS), 999, torch.bfloat16)
    columns = rows_of(CUTS * 2)

    def of(rows: list[int]) -> list[int]:
        own = {name: [column[row] for row in rows] for name, column in columns.items()}
        return by_kernels(logits_SV[rows], own)

    everything = of(list(range(len(logits_SV))))
    assert of(list(range(len(logits_SV)))[::-1]) == everything[::-1]
    assert [of([row])[0] for row in range(len(logits_SV))] == everything


def test_draws_are_as_frequent_as_they_should_be() -> None:
    """Four tokens of five; 3 degrees of freedom, a limit that 1 in 10,000 exceeds."""
    logits_SV = torch.tensor([[0.4, 1.3, -2.5, 0.9, 1.6]]).expand(300, -1).contiguous()
    columns = rows_of([(1.0, 4, 1.0, 0.0)] * 300)
    counts = Counter(by_kernels(logits_SV, columns))
    assert set(counts) == {0, 1, 3, 4}
    probabilities = logits_SV[0, [0, 1, 3, 4]].double().softmax(-1) * 300
    observed = torch.tensor([counts[token] for token in (0, 1, 3, 4)])
    assert ((observed - probabilities) ** 2 / probabilities).sum() < 21.1


def test_no_rows_launch_nothing() -> None:
    with watched() as watch, triton_on_cpu():
        assert sampling.sample(torch.empty(0, 99), [], [], [], [], [], []).tolist() == []
    assert watch.num_launches == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cut", "most_reads"),
    [
        ((0.0, 0, 1.0, 0.0), 1.0),
        ((1.0, 0, 1.0, 0.0), 1.0),
        ((1.0, 0, 1.0, 0.1), 2.0),
        ((1.0, 64, 0.95, 0.0), 1.01),
        ((1.0, 1000, 0.95, 0.0), 1.2),
    ],
    ids=str,
)
def test_a_whole_vocabulary_is_read_about_once(
    monkeypatch: pytest.MonkeyPatch,
    cut: tuple[float, int, float, float],
    most_reads: float,
    dtype: torch.dtype,
) -> None:
    """With the blocks and lists of a real vocabulary."""
    for name, value in dict(NUM_COLUMNS=8192, BLOCK_COLUMNS=64, SLOTS=32, CHUNK=4096).items():
        for module in (draw, candidates):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    for module in MODULES:
        monkeypatch.setattr(module, "MAX_TOP_K", 1024, raising=False)
    monkeypatch.setattr(draw, "BLOCK_V", 2048)
    logits_SV, columns = random_logits(1, 262_144, dtype), rows_of([cut])
    expected = sampling.sample(logits_SV, **columns).tolist()
    with watched({"logits": logits_SV}) as watch, triton_on_cpu():
        assert sampling.sample(logits_SV, **columns).tolist() == expected
    assert watch.by_name["logits"].loaded <= most_reads * 262_144 * dtype.itemsize


def check_all() -> None:
    """Rows of all kinds, the uncut ones last; cuts below zero; and cuts among equals."""
    cuts = [*CUTS[::-1], (0.6, 100, 0.4173, 0.0), (1.0, 90, 1.0, 0.2), (1.0, 0, 1.0, 0.0)] * 2
    logits_SV = random_logits(len(cuts), 999, torch.bfloat16)
    check_against_reference(logits_SV, rows_of(cuts))
    check_against_reference(logits_SV.contiguous() - 20, rows_of(cuts, seed=6))
    cuts = [(1.0, 3, 1.0, 0.0)] * 6 + [(1.0, 100, 1.0, 0.0)] * 3 + [(1.0, 0, 0.3173, 0.0)]
    logits_SV = torch.zeros(len(cuts), 999)
    logits_SV[:, :400] = -0.0
    check_against_reference(logits_SV, rows_of(cuts))


def test_the_check_of_bugs_passes_without_one() -> None:
    check_all()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        pytest.param(draw, "b_score, o_v, V)", "b_score, -o_v, V)", id="last of equal scores"),
        pytest.param(draw, "i_s * stride_ls + o_v", "i_n * stride_ls + o_v", id="row of the kind"),
        pytest.param(draw, "i_s * stride_ls,", "i_s * V,", id="row stride"),
        pytest.param(draw, "o_v < V)", "o_v <= V)", id="one logit too many"),
        pytest.param(draw, "b_score < floor", "b_score > floor", id="min_p cuts the likely"),
        pytest.param(draw, "& (b_score >= floor)", "", id="no min_p after a cut"),
        pytest.param(draw, "top_p * mass", "top_p", id="top_p of the whole row"),
        pytest.param(draw, "peak, temperature, True", "peak, 1.0, True", id="top_p without T"),
        pytest.param(draw, "& (tl.max(b_count, 0) <= SLOTS)", "", id="list that overflowed"),
        pytest.param(draw, "num_blocks * SLOTS, V", "SLOTS, V", id="first block of a list only"),
        pytest.param(draw, "b_key >= low", "b_key > low", id="last of a cut left out"),
        pytest.param(candidates, "mass >= target", "mass > target", id="one more than top_k"),
        pytest.param(candidates, "(0xFFFFFF - b_token)", "b_token", id="last of equals first"),
        pytest.param(candidates, "b_value == 0.0, 0.0, b_value", "b_value == 0.0, b_value, b_value",
                     id="minus zero below zero"),
        pytest.param(candidates, "b_bits ^ 0x7FFFFFFF", "b_bits", id="negative logits reversed"),
        pytest.param(candidates, "b_maximum >= floor", "b_maximum > floor", id="column"),
        pytest.param(candidates, "m = (b_value >= floor)", "m = (b_value > floor)", id="floor"),
        pytest.param(candidates, "m & (b_slot < SLOTS)", "m", id="slots of the next block"),
        pytest.param(candidates, "o % slots < b_count", "o < size", id="empty slots"),
        pytest.param(candidates, "* num_columns + o_c[None", "* (num_columns // 2) + o_c[None",
                     id="columns overlap"),
        pytest.param(gumbel, "key >> 32", "key >> 16", id="half a key"),
        pytest.param(gumbel, "0xC2B2AE35", "0xC2B2AE36", id="another hash"),
    ],
)  # fmt: skip
def test_bugs_are_noticed(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, old: str, new: str
) -> None:
    with mutated(module, old, new, count=0) as mutant:
        shrink(monkeypatch, mutant)
        replace_everywhere(monkeypatch, module, mutant)
        with pytest.raises((KernelBug, AssertionError)):
            check_all()


def replace_everywhere(patch: pytest.MonkeyPatch, original: ModuleType, mutant: ModuleType) -> None:
    """What modules have imported from the original comes from the mutant. The reference stays."""
    spared: list[Callable[..., Any]] = [candidates.largest, gumbel.gumbel, gumbel.noise_key]
    for user, (name, value) in itertools.product(MODULES, vars(mutant).items()):
        before = getattr(original, name, None)
        if callable(value) and before not in spared and getattr(user, name, None) is before:
            patch.setattr(user, name, value)
