"""Penalties, biases and bans against OpenAI's and vLLM's formulas; draws independent of mates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bezel.engine.kv_layout import KVLayout
from bezel.engine.page_tables import PageTables
from bezel.engine.sampler import Sampler
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.sequence import Sequence
from bezel.kernels.jit import triton_on_cpu

LAYOUT = KVLayout(
    window=8, local_page_size=8, global_page_size=32, local_page_bytes=64, global_page_bytes=64
)
VOCAB_SIZE = 1000
GREEDY = dict(max_tokens=100, temperature=0.0)
MakeSequence = Callable[..., Sequence]


@pytest.fixture
def make_sequence() -> MakeSequence:
    def make(
        prompt_ids: list[int],
        output_ids: list[int],
        *,
        seed: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        **params: Any,
    ) -> Sequence:
        sequence = Sequence(
            request_id="r",
            token_ids=list(prompt_ids),
            params=SamplingParams(**(GREEDY | params)),
            seed=seed,
            stop_token_ids=stop_token_ids,
            pages=PageTables(LAYOUT),
        )
        for token_id in output_ids:
            sequence.append(token_id)
        return sequence

    return make


def adjusted(sequence: Sequence, logits: list[float], suppressed: list[int] | None = None) -> Any:
    """The logits that the draw sees."""
    logits_NV = torch.tensor([logits])
    Sampler(suppressed or [], VOCAB_SIZE).sample(logits_NV, [sequence])
    return logits_NV[0].tolist()


def test_greedy_takes_the_largest(make_sequence: MakeSequence) -> None:
    logits_NV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 3.5]])
    sequences = [make_sequence([1], []), make_sequence([1], [])]
    assert Sampler([], VOCAB_SIZE).sample(logits_NV, sequences).tolist() == [1, 2]


def test_presence_and_frequency_count_the_output_only(make_sequence: MakeSequence) -> None:
    sequence = make_sequence([0, 0, 1], [2, 3, 2, 2], presence_penalty=0.5, frequency_penalty=0.25)
    assert adjusted(sequence, [1.0, 1.0, 1.0, -1.0, 1.0]) == [
        1.0,
        1.0,
        1.0 - 0.5 - 3 * 0.25,
        -1.0 - 0.5 - 1 * 0.25,
        1.0,
    ]


def test_negative_penalties_encourage(make_sequence: MakeSequence) -> None:
    sequence = make_sequence([0], [1, 1], presence_penalty=-1.0, frequency_penalty=-0.5)
    assert adjusted(sequence, [0.0, 0.0]) == [0.0, 2.0]


@pytest.mark.parametrize(
    ("penalties", "expected"),
    [(dict(presence_penalty=2.0), 1.0 - 2.0), (dict(frequency_penalty=2.0), 1.0 - 4.0)],
    ids=["presence", "frequency"],
)
def test_each_penalty_works_alone(
    make_sequence: MakeSequence, penalties: dict[str, float], expected: float
) -> None:
    assert adjusted(make_sequence([0], [1, 1], **penalties), [1.0, 1.0]) == [1.0, expected]


def test_repetition_counts_prompt_and_output_once(make_sequence: MakeSequence) -> None:
    """Positive logits are divided, negative ones multiplied."""
    sequence = make_sequence([0, 0, 1], [2, 2], repetition_penalty=2.0)
    assert adjusted(sequence, [3.0, -3.0, 4.0, 5.0, -5.0]) == [1.5, -6.0, 2.0, 5.0, -5.0]


def test_repetition_below_1_encourages(make_sequence: MakeSequence) -> None:
    sequence = make_sequence([0, 1], [], repetition_penalty=0.5)
    assert adjusted(sequence, [3.0, -3.0, 1.0]) == [6.0, -1.5, 1.0]


def test_repetition_comes_before_the_subtracted_penalties(make_sequence: MakeSequence) -> None:
    sequence = make_sequence([5], [1], repetition_penalty=2.0, presence_penalty=1.0)
    assert adjusted(sequence, [0.0, 4.0, 0.0, 0.0, 0.0, 0.0])[1] == 4.0 / 2.0 - 1.0


def test_logit_bias_is_added_after_penalties(make_sequence: MakeSequence) -> None:
    sequence = make_sequence([0], [1], repetition_penalty=2.0, logit_bias={1: 3.0, 2: -100.0})
    assert adjusted(sequence, [0.0, 4.0, 1.0, 1.0]) == [0.0, 5.0, -99.0, 1.0]


def test_logit_bias_decides(make_sequence: MakeSequence) -> None:
    logits = [[5.0, 0.0, 1.0]]
    for bias, expected in (({1: 6.0}, 1), ({0: -4.5}, 2)):
        sequence = make_sequence([0], [], logit_bias=bias)
        assert Sampler([], VOCAB_SIZE).sample(torch.tensor(logits), [sequence]).tolist() == [
            expected
        ]


def test_suppressed_tokens_are_never_drawn_whatever_the_bias(make_sequence: MakeSequence) -> None:
    sampler = Sampler([1, 3], VOCAB_SIZE)
    greedy = make_sequence([0], [1], logit_bias={1: 100.0}, repetition_penalty=0.5)
    assert sampler.sample(torch.tensor([[0.0, 9.0, 1.0, 9.0]]), [greedy]).tolist() == [2]
    sequences = [
        make_sequence([0], [], temperature=2.0, seed=seed, logit_bias={3: 100.0})
        for seed in range(200)
    ]
    assert set(sampler.sample(torch.zeros(200, 4), sequences).tolist()) == {0, 2}


def test_stop_tokens_are_banned_below_min_tokens(make_sequence: MakeSequence) -> None:
    logits, stop = [0.0, 1.0, 9.0, 8.0], frozenset({2, 3})
    for num_output, expected in ((0, 1), (1, 1), (2, 2), (3, 2)):
        sequence = make_sequence([0], [1] * num_output, min_tokens=2, stop_token_ids=stop)
        assert Sampler([], VOCAB_SIZE).sample(torch.tensor([logits]), [sequence]).tolist() == [
            expected
        ]


def test_min_tokens_outweighs_a_bias(make_sequence: MakeSequence) -> None:
    sequence = make_sequence(
        [0], [], min_tokens=1, stop_token_ids=frozenset({1}), logit_bias={1: 100.0}
    )
    assert adjusted(sequence, [0.0, 0.0]) == [0.0, float("-inf")]


def test_adjustments_stay_in_their_row(make_sequence: MakeSequence) -> None:
    logits_NV = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    sequences = [
        make_sequence([0], [2], presence_penalty=2.0),
        make_sequence([0], [2]),
        make_sequence([0], [], logit_bias={0: 5.0}),
    ]
    assert Sampler([], VOCAB_SIZE).sample(logits_NV, sequences).tolist() == [1, 2, 0]
    assert logits_NV.tolist() == [[1.0, 2.0, 1.0], [1.0, 2.0, 3.0], [6.0, 2.0, 3.0]]


def test_seeded_draws_do_not_depend_on_batch_mates(make_sequence: MakeSequence) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(20, 300, generator=generator).bfloat16().float()
    kinds: list[dict[str, Any]] = [
        dict(temperature=1.0),
        dict(temperature=0.0),
        dict(temperature=0.8, top_k=64, top_p=0.95),
        dict(temperature=1.5, top_p=0.9),
        dict(temperature=1.0, min_p=0.05, top_k=7),
    ]
    sequences = [
        make_sequence([1, 2], [3] * (row % 3), seed=row // 5, **kinds[row % 5]) for row in range(20)
    ]
    sampler = Sampler([], VOCAB_SIZE)
    together = sampler.sample(logits_NV.clone(), sequences).tolist()
    backwards = sampler.sample(logits_NV.flip(0).clone(), sequences[::-1]).tolist()
    alone = [sampler.sample(logits_NV[[i]], [sequences[i]]).item() for i in range(20)]
    assert together == backwards[::-1] == alone


def test_seed_and_position_decide_the_draw(make_sequence: MakeSequence) -> None:
    def sampled(seed: int, num_output: int) -> list[int]:
        sequences = [
            make_sequence([0] * n, [0] * num_output, seed=seed, temperature=1.0)
            for n in range(1, 41)
        ]
        token_ids: list[int] = (
            Sampler([], VOCAB_SIZE).sample(torch.zeros(40, 1000), sequences).tolist()
        )
        return token_ids

    assert sampled(1, 0) == sampled(1, 0)
    assert sampled(1, 0) != sampled(2, 0)
    # The position is the number of tokens before, whether sampled or of the prompt.
    assert sampled(1, 0)[1:] == sampled(1, 1)[:-1]
    assert len(set(sampled(1, 0))) > 30


def test_every_cut_reaches_the_draw(
    make_sequence: MakeSequence,
) -> None:
    """Ten tokens, the first two far likelier than the others and nearly alike."""
    logits = [3.0, 2.9] + [0.0] * 8
    for params, expected in (
        (dict(top_k=1), {0}),
        (dict(top_k=2), {0, 1}),
        (dict(top_p=0.5), {0, 1}),
        (dict(min_p=0.5), {0, 1}),
        (dict(min_p=0.95), {0}),
        (dict(top_k=2**63 - 1), set(range(10))),
        (dict(), set(range(10))),
    ):
        sequences = [
            make_sequence([0], [], seed=seed, temperature=1.0, **params) for seed in range(500)
        ]
        sampled = Sampler([], VOCAB_SIZE).sample(torch.tensor([logits] * 500), sequences)
        assert set(sampled.tolist()) == expected


@pytest.mark.parametrize("num_output", [0, 1, 3])
def test_all_adjustments_of_a_row_together(make_sequence: MakeSequence, num_output: int) -> None:
    """More of them than one row's sixteen, beside a row with none; against the formulas."""
    prompt, output = list(range(0, 40, 2)), [1, 2, 1][:num_output]
    sequence = make_sequence(
        prompt,
        output,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        logit_bias={2: 3.0, 49: -1.0, 4: 1.0},
        min_tokens=2,
        stop_token_ids=frozenset({4, 5}),
    )
    logits_NV = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    before = logits_NV.tolist()
    Sampler([7], VOCAB_SIZE).sample(logits_NV, [make_sequence([0], []), sequence])
    before[0][7] = before[1][7] = float("-inf")
    for token, value in enumerate(before[1]):
        if token in prompt + output:
            value = value / 1.5 if value > 0 else value * 1.5
        if token in output:
            value -= 0.25 + 0.5 * output.count(token)
        value += {2: 3.0, 49: -1.0, 4: 1.0}.get(token, 0.0)
        before[1][token] = float("-inf") if token in (4, 5) and num_output < 2 else value
    torch.testing.assert_close(logits_NV, torch.tensor(before))


def test_nothing_to_sample(make_sequence: MakeSequence) -> None:
    assert Sampler([1], VOCAB_SIZE).sample(torch.empty(0, 4), []).tolist() == []


@pytest.mark.parametrize("suppressed", [[], [3, VOCAB_SIZE, 5]])
def test_kernels_draw_what_the_reference_draws(
    make_sequence: MakeSequence, suppressed: list[int]
) -> None:
    """Interpreted, from the sequences to the tokens."""
    watched = pytest.importorskip("simulator.watch").watched
    kinds: list[dict[str, Any]] = [
        dict(temperature=1.0, presence_penalty=1.0, repetition_penalty=1.2),
        dict(logit_bias={7: 4.0}),
        dict(temperature=0.8, top_k=64, top_p=0.95),
        dict(temperature=1.5, top_p=0.9, min_tokens=9, stop_token_ids=frozenset({3, 4})),
        dict(temperature=1.0, min_p=0.05),
    ]
    sequences = [make_sequence([1, 2], [3, 3, 8], seed=i, **kind) for i, kind in enumerate(kinds)]
    logits_NV = torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3
    by_kernels_NV = logits_NV.clone()
    expected = Sampler(suppressed, VOCAB_SIZE).sample(logits_NV, sequences)
    with triton_on_cpu(), watched() as watch:
        tokens = Sampler(suppressed, VOCAB_SIZE).sample(by_kernels_NV, sequences)
    assert torch.equal(tokens, expected) and torch.equal(by_kernels_NV, logits_NV)
    assert watch.num_launches == 8
