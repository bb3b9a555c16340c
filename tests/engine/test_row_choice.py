"""Rows that somebody wants, of single tokens, chunks and prompts with log-probabilities."""

import numpy as np
import pytest

from bezel.engine.kv_layout import KVLayout
from bezel.engine.page_tables import PageTables
from bezel.engine.row_choice import RowChoice
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledSequence
from bezel.engine.sequence import Sequence

LAYOUT = KVLayout(32, 16, 64, local_page_bytes=16, global_page_bytes=64)


def scheduled(
    start: int, end: int, prompt: int, output: int = 0, asks: bool = False
) -> ScheduledSequence:
    """Positions [start, end) of a sequence; its tables hold -1 before the step, 7 with it."""
    params = SamplingParams(max_tokens=10, prompt_logprobs=1 if asks else None)
    sequence = Sequence("", [5] * prompt, params, 0, frozenset(), PageTables(LAYOUT))
    sequence.token_ids += [6] * output
    read_table = sequence.pages.local_table[:]
    for i in range(LAYOUT.ring_size):
        sequence.pages.local_table[i] = 7
    if end - start == 1:
        read_table = sequence.pages.local_table
    return ScheduledSequence(sequence, start, end - start, read_table, end)


DECODE = scheduled(12, 13, prompt=10, output=3)
ENDS = scheduled(4, 10, prompt=10)
GOES_ON = scheduled(4, 10, prompt=11)
ASKS = scheduled(4, 10, prompt=20, asks=True)
ASKS_AND_ENDS = scheduled(4, 10, prompt=10, asks=True)
ASKED_BEFORE = scheduled(10, 13, prompt=10, output=3, asks=True)
SINGLE_GOES_ON = scheduled(4, 5, prompt=10)
SINGLE_ASKS = scheduled(4, 5, prompt=10, asks=True)


@pytest.mark.parametrize(
    ("step", "rows", "num_decodes", "q_lens"),
    [
        ([ENDS], [5], 1, []),
        ([GOES_ON], [], 0, []),
        ([GOES_ON, GOES_ON], [], 0, []),
        ([DECODE, GOES_ON], [0], 1, []),
        ([DECODE, ENDS], [0, 6], 2, []),
        ([SINGLE_GOES_ON, DECODE], [1], 1, []),
        ([SINGLE_GOES_ON, SINGLE_ASKS], [1], 1, []),
        ([ASKED_BEFORE], [2], 1, []),
        ([GOES_ON, ASKS], [*range(6, 12)], 0, [6]),
        (
            [DECODE, ASKS, ENDS, GOES_ON, ASKS_AND_ENDS],
            [0, 12, *range(1, 7), *range(19, 25)],
            2,
            [6, 6],
        ),
    ],
)
def test_rows(
    step: list[ScheduledSequence], rows: list[int], num_decodes: int, q_lens: list[int]
) -> None:
    choice = RowChoice.of(step)
    assert choice is not None
    assert choice.rows_N.tolist() == rows and choice.rows_N.dtype == np.int64
    assert (choice.num_decodes, choice.q_lens) == (num_decodes, q_lens)


@pytest.mark.parametrize("step", [[DECODE], [DECODE, DECODE], [SINGLE_ASKS], [DECODE, ASKS]])
def test_nothing_to_choose(step: list[ScheduledSequence]) -> None:
    assert RowChoice.of(step) is None


def test_what_was_a_chunk_reads_what_it_has_written() -> None:
    step = [DECODE, ASKS, ENDS]
    choice = RowChoice.of(step)
    assert choice is not None
    token_ids_T, lengths_S = np.arange(13) * 10, np.asarray([s.end for s in step])
    ring_SR = np.stack([np.asarray(s.local_read_table) for s in step])
    global_SP = np.asarray([[1, 2], [3, 4], [5, 6]])
    assert ring_SR[:, 0].tolist() == [7, -1, -1]
    ids_N, lengths, local, global_ = choice.select([token_ids_T, lengths_S, ring_SR, global_SP])
    assert ids_N.tolist() == [0, 120, *range(10, 70, 10)]
    assert lengths.tolist() == [13, 10, 10]
    assert (local == [[7], [7], [-1]]).all()
    assert global_.tolist() == [[1, 2], [5, 6], [3, 4]]
    assert ring_SR[2, 0] == -1, "the step's own table stays"
