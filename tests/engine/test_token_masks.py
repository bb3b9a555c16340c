"""Masks of grammars and of thoughts that have to end, up to the draw."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from bezel.engine.errors import GrammarError
from bezel.engine.grammar import GrammarState, Mask
from bezel.engine.kv_layout import KVLayout
from bezel.engine.messages import FailureCause, FinishReason
from bezel.engine.page_tables import PageTables
from bezel.engine.sampler import Sampler
from bezel.engine.sampling_params import SamplingParams, ThinkingBudget
from bezel.engine.sequence import Sequence

LAYOUT = KVLayout(
    window=8, local_page_size=8, global_page_size=32, local_page_bytes=64, global_page_bytes=64
)
VOCAB_SIZE = 100  # not a multiple of 32
OPEN, CLOSE, EOS = 60, 63, 64
MakeSequence = Callable[..., Sequence]


class Script:
    """A grammar of fixed choices: a set of tokens for each place, then the end."""

    def __init__(self, *choices: set[int]) -> None:
        self.choices = [*choices]

    @property
    def is_finished(self) -> bool:
        return not self.choices

    def fill_mask(self, mask_W: Mask) -> None:
        mask_W[:] = np.packbits(
            [i in self.choices[0] for i in range(32 * len(mask_W))], bitorder="little"
        ).view(np.int32)

    def accept(self, token_id: int) -> None:
        assert token_id in self.choices.pop(0)


class Broken(Script):
    """A grammar that fails when asked, after having written something."""

    def fill_mask(self, mask_W: Mask) -> None:
        mask_W[:] = -1
        raise GrammarError("too many states")


@pytest.fixture
def make_sequence() -> MakeSequence:
    def make(
        grammar: Script | None = None,
        *,
        stop_token_ids: frozenset[int] = frozenset({EOS}),
        seed: int = 0,
        **params: Any,
    ) -> Sequence:
        return Sequence(
            request_id="r",
            token_ids=[1],
            params=SamplingParams(**(dict(max_tokens=100, temperature=1.0) | params)),
            seed=seed,
            stop_token_ids=stop_token_ids,
            pages=PageTables(LAYOUT),
            grammar=cast(GrammarState, grammar),
        )

    return make


def thinking(num_tokens: int) -> ThinkingBudget:
    return ThinkingBudget(num_tokens=num_tokens, open_id=OPEN, close_id=CLOSE, is_open=True)


def draw(
    sequences: list[Sequence], suppressed: list[int] | None = None
) -> list[int | FailureCause]:
    logits_NV = torch.randn(
        len(sequences), VOCAB_SIZE, generator=torch.Generator().manual_seed(len(sequences))
    )
    return Sampler(suppressed or [], VOCAB_SIZE).draw(logits_NV, sequences).fetch()[0]


def drawn(make: Callable[[int], Sequence], num_draws: int = 300) -> set[int | FailureCause]:
    """What is drawn with many seeds."""
    return {*draw([make(seed) for seed in range(num_draws)])}


ALLOWED = [{3}, {0, 31}, {32, 63, 64}, {99}, {0, 31, 32, 62, 63, 64, 95, 96, 99}]


@pytest.mark.parametrize("allowed", ALLOWED, ids=str)
def test_only_what_is_allowed_is_drawn(make_sequence: MakeSequence, allowed: set[int]) -> None:
    assert drawn(lambda seed: make_sequence(Script(allowed), seed=seed)) == allowed


def test_a_bias_or_a_cut_does_not_outweigh_it(make_sequence: MakeSequence) -> None:
    params: dict[str, Any]
    for params in (dict(logit_bias={5: 100.0}), dict(top_k=1), dict(temperature=0.0)):
        assert drawn(lambda s, p=params: make_sequence(Script({7}), seed=s, **p), 9) == {7}  # type: ignore[misc]


def test_rows_without_a_mask_draw_what_they_draw_without_such_mates(
    make_sequence: MakeSequence,
) -> None:
    def sequences(*, bound: bool) -> list[Sequence]:
        return [
            make_sequence(Script({9}) if bound and row % 3 == 1 else None, seed=row)
            for row in range(40)
        ]

    free, mixed = draw(sequences(bound=False)), draw(sequences(bound=True))
    assert [token for row, token in enumerate(mixed) if row % 3 != 1] == [
        token for row, token in enumerate(free) if row % 3 != 1
    ]
    assert {*mixed[1::3]} == {9}


def test_a_spent_thought_is_closed(make_sequence: MakeSequence) -> None:
    assert drawn(lambda s: make_sequence(seed=s, thinking_budget=thinking(0)), 50) == {CLOSE}
    assert len(drawn(lambda s: make_sequence(seed=s, thinking_budget=thinking(1)))) > 50


def test_a_spent_thought_is_closed_even_if_that_is_a_banned_stop_token(
    make_sequence: MakeSequence,
) -> None:
    stop = frozenset({CLOSE, EOS})
    sequence = make_sequence(thinking_budget=thinking(0), min_tokens=5, stop_token_ids=stop)
    assert draw([sequence]) == [CLOSE]


def test_a_thought_within_a_grammar_is_closed_once_the_grammar_lets_it(
    make_sequence: MakeSequence,
) -> None:
    sequence = make_sequence(Script({5}, {6, CLOSE}, {7}), thinking_budget=thinking(0))
    tokens = []
    for _ in range(3):
        (token_id,) = draw([sequence])
        assert isinstance(token_id, int)
        tokens.append(token_id)
        sequence.append(token_id)
    assert tokens == [5, CLOSE, 7]


def test_min_tokens_bans_stop_tokens_while_others_remain(make_sequence: MakeSequence) -> None:
    def make(seed: int, min_tokens: int, allowed: set[int]) -> Sequence:
        sequence = make_sequence(Script({8}, allowed), seed=seed, min_tokens=min_tokens)
        sequence.append(8)
        return sequence

    assert drawn(lambda seed: make(seed, 2, {5, EOS})) == {5}
    assert drawn(lambda seed: make(seed, 2, {EOS}), 9) == {EOS}
    assert drawn(lambda seed: make(seed, 1, {5, EOS})) == {5, EOS}


@pytest.mark.parametrize(
    ("grammar", "suppressed"),
    [(Broken({5}), []), (Script(set()), []), (Script({5, 6}), [5, 6])],
    ids=["failing", "nothing allowed", "nothing left"],
)
def test_a_grammar_that_leaves_no_token_is_the_cause(
    make_sequence: MakeSequence, grammar: Script, suppressed: list[int]
) -> None:
    sequences = [make_sequence(seed=1), make_sequence(grammar), make_sequence(Script({9}))]
    first, second, third = draw(sequences, suppressed)
    assert isinstance(first, int) and second is FailureCause.GRAMMAR and third == 9


def test_logits_of_nan_are_not_the_grammars_fault(make_sequence: MakeSequence) -> None:
    logits_NV = torch.full((2, VOCAB_SIZE), torch.nan)
    sequences = [make_sequence(Script({9})), make_sequence()]
    token_ids, _ = Sampler([], VOCAB_SIZE).draw(logits_NV, sequences).fetch()
    assert token_ids[0] in (FailureCause.ENGINE, 9) and isinstance(token_ids[1], int)


def test_the_end_of_a_grammar_ends_the_sequence(make_sequence: MakeSequence) -> None:
    sequence = make_sequence(Script({5}, {6}), stop_token_ids=frozenset(), min_tokens=9)
    assert [sequence.append(5), sequence.append(6)] == [None, FinishReason.STOP]
    sequence = make_sequence(Script({5}, {6}, {7}), max_tokens=2)
    assert [sequence.append(5), sequence.append(6)] == [None, FinishReason.LENGTH]
    sequence = make_sequence(Script({5}, {6}), max_tokens=2)
    assert [sequence.append(5), sequence.append(6)] == [None, FinishReason.STOP]


def test_a_grammar_that_fails_on_a_token_ends_the_sequence_in_an_error(
    make_sequence: MakeSequence,
) -> None:
    class Failing(Script):
        def accept(self, token_id: int) -> None:
            raise GrammarError("too many states")

    sequence = make_sequence(Failing({5}, {6}))
    assert sequence.append(5) is FinishReason.ERROR
    assert sequence.failure is FailureCause.GRAMMAR
