"""Log-probabilities of raw logits, for the rows that ask and as many as they ask for."""

from typing import Any

import pytest
import torch

from bezel.engine import logprobs as module
from bezel.engine.kv_layout import KVLayout
from bezel.engine.logprobs import PROMPT_ROWS, PromptLogprobs, RawLogits
from bezel.engine.messages import TokenLogprobs
from bezel.engine.page_tables import PageTables
from bezel.engine.sampler import Sampler
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledSequence, ScheduledStep
from bezel.engine.sequence import Sequence

LAYOUT = KVLayout(
    window=8, local_page_size=8, global_page_size=32, local_page_bytes=64, global_page_bytes=64
)
VOCAB_SIZE = 50


def make_sequence(prompt_ids: list[int] | None = None, name: str = "r", **params: Any) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=prompt_ids or [1, 2, 3],
        params=SamplingParams(**(dict(max_tokens=9, temperature=0.0) | params)),
        seed=0,
        stop_token_ids=frozenset({4}),
        pages=PageTables(LAYOUT),
    )


def random_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(num_rows))


def assert_of_row(
    entry: TokenLogprobs, logits_V: torch.Tensor, token_id: int, num_top: int
) -> None:
    expected_V = logits_V.double().log_softmax(-1)
    assert entry.logprob == pytest.approx(expected_V[token_id].item(), abs=1e-5)
    values, ids = expected_V.topk(num_top)
    assert entry.top_ids == ids.tolist()
    assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)


EDITS: list[dict[str, Any]] = [
    dict(),
    dict(repetition_penalty=3.0),
    dict(logit_bias={7: 100.0}),
    dict(min_tokens=5, logit_bias={4: 50.0}),
    dict(temperature=2.0, top_k=3),
]


@pytest.mark.parametrize("suppressed", [[], [0, 9, 30]], ids=["", "suppressed"])
@pytest.mark.parametrize("all_ask", [True, False])
@pytest.mark.parametrize("edited", [True, False])
def test_raw_logits_of_those_that_ask(suppressed: list[int], all_ask: bool, edited: bool) -> None:
    counts = [0, 1, 20, None, 5, 3, None, 2]
    sequences = [
        make_sequence(
            logprobs=4 if all_ask and count is None else count,
            **EDITS[row % len(EDITS) if edited else 0],
        )
        for row, count in enumerate(counts)
    ]
    raw_NV = random_logits(len(counts))
    token_ids, entries = Sampler(suppressed, VOCAB_SIZE).draw(raw_NV.clone(), sequences).fetch()
    assert token_ids == Sampler(suppressed, VOCAB_SIZE).sample(raw_NV.clone(), sequences).tolist()
    asked = {row: s.params.logprobs for row, s in enumerate(sequences)}
    assert [*entries] == [row for row, count in asked.items() if count is not None]
    for row, entry in entries.items():
        token_id, count = token_ids[row], asked[row]
        assert token_id is not None and count is not None
        assert_of_row(entry, raw_NV[row], token_id, count)


def test_no_more_than_the_vocabulary_has() -> None:
    logits_NV = torch.randn(1, 5)
    _, entries = Sampler([], 5).draw(logits_NV, [make_sequence(logprobs=20)]).fetch()
    assert sorted(entries[0].top_ids) == [0, 1, 2, 3, 4]


def test_nothing_is_copied_without_need() -> None:
    logits_NV = random_logits(3)
    asking, other = make_sequence(logprobs=1), make_sequence()
    kept = RawLogits.keep(logits_NV, [asking] * 3, changes=False)
    assert kept.logits_RV is logits_NV
    kept = RawLogits.keep(logits_NV, [other, asking, other], changes=True)
    assert torch.equal(kept.logits_RV, logits_NV[1:2])
    logits_NV.fill_(0)
    assert kept.logits_RV.any()


def test_those_that_do_not_ask_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(module, "logprobs", forbidden)
    monkeypatch.setattr(RawLogits, "keep", forbidden)
    draws = Sampler([], VOCAB_SIZE).draw(random_logits(2), [make_sequence()] * 2)
    assert draws.fetch()[1] == {}
    scheduled = ScheduledSequence(make_sequence(), 0, 3, [], 0)
    hidden_TD = torch.zeros(3, 4)
    assert PromptLogprobs.compute(ScheduledStep([scheduled]), hidden_TD, forbidden) is None  # type: ignore[arg-type]


def test_prompts_in_blocks_of_rows() -> None:
    """Chunks of three prompts and a decode: each position that predicts a token of a prompt that
    asks, once, and never more than PROMPT_ROWS of logits."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (200, 90, 30)
    ]
    asking = [
        make_sequence(prompts[0], "a", prompt_logprobs=2),
        make_sequence(prompts[1], "b", prompt_logprobs=0),
        make_sequence(prompts[2], "c"),
    ]
    decoding = make_sequence([5], "d", prompt_logprobs=20)
    asking[1].num_once_computed = 70
    step = ScheduledStep(
        [
            ScheduledSequence(decoding, 0, 1, [], 0),
            ScheduledSequence(asking[2], 0, 30, [], 0),
            ScheduledSequence(asking[0], 10, 150, [], 0),
            ScheduledSequence(asking[1], 60, 30, [], 0),
        ]
    )
    logits_TV = random_logits(1 + 30 + 150 + 30)
    sizes = []

    def logits(rows_R1: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows_R1))
        return logits_TV[rows_R1[:, 0]]

    found = PromptLogprobs.compute(step, torch.arange(len(logits_TV))[:, None], logits)
    assert found is not None
    pieces = found.fetch()
    assert max(sizes) <= PROMPT_ROWS and sum(sizes) == 150 + 19
    assert {name: len(piece) for name, piece in pieces.items()} == {"a": 150, "b": 19}
    for i, entry in enumerate(pieces["a"]):
        assert_of_row(entry, logits_TV[31 + i], prompts[0][10 + i + 1], 2)
    for i, entry in enumerate(pieces["b"]):
        assert_of_row(entry, logits_TV[181 + 10 + i], prompts[1][70 + i + 1], 0)


def test_the_last_token_of_a_prompt_predicts_no_more_of_it() -> None:
    sequence = make_sequence([1, 2, 3])
    for start, num_tokens, expected in (
        (0, 3, range(0, 2)),
        (0, 2, range(0, 2)),
        (1, 1, range(1, 2)),
        (2, 1, range(2, 2)),
    ):
        assert ScheduledSequence(sequence, start, num_tokens, [], 0).prompt_positions == expected
    sequence.append(7)
    assert not ScheduledSequence(sequence, 3, 1, [], 0).prompt_positions
    assert ScheduledSequence(sequence, 0, 4, [], 0).prompt_positions == range(0, 2)
    sequence.num_once_computed = 1
    assert ScheduledSequence(sequence, 0, 4, [], 0).prompt_positions == range(1, 2)
