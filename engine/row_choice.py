"""Which rows of a step somebody wants the result of.

They are the last rows of sequences that draw a token, and all rows of prompts whose
log-probabilities are asked for:

    tokens    [d0][d1][--- chunk 0 ---][-- chunk 1, drawn --][-- chunk 2, log-probabilities --]
    wanted    [d0][d1]                                   [c1][-- chunk 2, log-probabilities --]
              single rows                                    chunks
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bezel.engine.scheduler import ScheduledSequence

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowChoice:
    """Sequences of a step with their number in it, those with a single row first; the rows of them
    all, and how many each of the others has."""

    numbered: list[tuple[int, ScheduledSequence]]
    num_decodes: int
    rows_N: Ints
    q_lens: list[int]

    @classmethod
    def of(cls, scheduled: list[ScheduledSequence]) -> "RowChoice | None":
        """None if all rows are wanted."""
        if all(s.num_tokens == 1 and s.is_sampled for s in scheduled):  # as a rule
            return None
        ends = offsets([s.num_tokens for s in scheduled])[1:]
        numbered = [(i, s) for i, s in enumerate(scheduled) if s.is_sampled or _is_whole(s)]
        numbered.sort(key=lambda pair: _stays_chunk(pair[1]))
        q_lens = [s.num_tokens for _, s in numbered if _stays_chunk(s)]
        num_decodes = len(numbered) - len(q_lens)
        rows = [np.arange(ends[i] - 1, ends[i]) for i, _ in numbered[:num_decodes]]
        rows += [np.arange(ends[i] - s.num_tokens, ends[i]) for i, s in numbered[num_decodes:]]
        if sum(map(len, rows)) == ends[-1]:
            return None
        return cls(numbered, num_decodes, np.concatenate([ends[:0], *rows]), q_lens)

    def select(self, arrays: list[Ints]) -> list[Ints]:
        """What is theirs of a step's `row_arrays` and global tables (see `batch`).

        What was a chunk and is a single row now reads the pages that the chunk has written.
        """
        *rows, seq_lens_S, local_table_SR, global_table_SP = arrays
        chosen = np.asarray([i for i, _ in self.numbered], dtype=np.int64)
        local_table_SR = local_table_SR[chosen]
        for i, (_, scheduled) in enumerate(self.numbered[: self.num_decodes]):
            local_table_SR[i] = scheduled.sequence.pages.local_table
        selected = [array[self.rows_N] for array in rows]
        return [*selected, seq_lens_S[chosen], local_table_SR, global_table_SP[chosen]]


def offsets(lengths: list[int]) -> Ints:
    """Where each of things laid end to end begins, and where the last one ends."""
    return np.cumsum([0, *lengths])


def _is_whole(scheduled: ScheduledSequence) -> bool:
    """Whether log-probabilities of the prompt want more than the last row."""
    is_asked = scheduled.sequence.params.prompt_logprobs is not None
    return is_asked and len(scheduled.prompt_positions) > 0


def _stays_chunk(scheduled: ScheduledSequence) -> bool:
    return scheduled.num_tokens > 1 and _is_whole(scheduled)
