"""Log-probabilities as sequences ask for them: of their draws, and of their prompts.

Both of the logits as the model gives them, before anything edits them. They are computed with the
step and stay on the device until its tokens are fetched.

T tokens in the step   R tokens with a log-probability   M likeliest tokens beside each
D model width   V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bezel.engine.messages import TokenLogprobs
from bezel.engine.scheduler import ScheduledStep
from bezel.engine.sequence import Sequence
from bezel.kernels.logprobs import logprobs
from bezel.kernels.sampling import to_device

PROMPT_ROWS = 64  # of a prompt's logits at once: those of a whole chunk would take gigabytes


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """Results on the device, as `kernels.logprobs` gives them; `num_top_R`, on the host, says how
    many of the M likeliest tokens each row has asked for."""

    logprobs_R: Tensor
    top_logprobs_RM: Tensor
    top_ids_RM: Tensor
    num_top_R: list[int]

    def fetch(self) -> list[TokenLogprobs]:
        """One for each row; waits for the device."""
        columns = (self.logprobs_R, self.top_ids_RM, self.top_logprobs_RM)
        rows = zip(*(column.tolist() for column in columns), self.num_top_R, strict=True)
        return [TokenLogprobs(own, ids[:n], values[:n]) for own, ids, values, n in rows]


@dataclass(frozen=True, slots=True)
class RawLogits:
    """Logits of the sequences that ask for log-probabilities of their draws: the R rows `rows`."""

    logits_RV: Tensor
    rows: list[int]
    num_top_R: list[int]

    @classmethod
    def keep(cls, logits_NV: Tensor, sequences: list[Sequence], changes: bool) -> "RawLogits":
        """Put them aside for as long as the draw takes; a copy, if that `changes` any, or if not
        all sequences ask."""
        asked = {
            row: sequence.params.logprobs
            for row, sequence in enumerate(sequences)
            if sequence.params.logprobs is not None
        }
        rows = list(asked)
        if changes or len(rows) < len(sequences):
            logits_NV = logits_NV[to_device(torch.tensor(rows), logits_NV.device)]
        return cls(logits_NV, rows, list(asked.values()))

    def logprobs(self, token_ids_N: Tensor) -> DeviceLogprobs:
        """Of the tokens drawn."""
        if len(self.rows) < len(token_ids_N):
            token_ids_N = token_ids_N[to_device(torch.tensor(self.rows), token_ids_N.device)]
        columns = _of_rows(self.logits_RV, token_ids_N, self.num_top_R)
        return DeviceLogprobs(*columns, self.num_top_R)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the tokens of prompts that a step has predicted; `lengths` are counted by request id."""

    logprobs: DeviceLogprobs
    lengths: dict[str, int]

    @classmethod
    def compute(
        cls, step: ScheduledStep, hidden_TD: Tensor, logits: Callable[[Tensor], Tensor]
    ) -> "PromptLogprobs | None":
        """None if no sequence of the step asks. `logits` is what the model makes of hidden rows.

        A sequence that is computed again after a preemption hears only what it hasn't heard yet.
        """
        rows, token_ids, num_top_R, lengths = _asked_rows(step)
        if not rows:
            return None
        index_R = to_device(torch.tensor(rows), hidden_TD.device)
        token_ids_R = to_device(torch.tensor(token_ids), hidden_TD.device)
        blocks = [
            _of_rows(logits(hidden_TD[block]), ids, num_top_R)
            for block, ids in zip(
                torch.split(index_R, PROMPT_ROWS),
                torch.split(token_ids_R, PROMPT_ROWS),
                strict=True,
            )
        ]
        logprobs_R, top_logprobs_RM, top_ids_RM = map(torch.cat, zip(*blocks, strict=True))
        return cls(DeviceLogprobs(logprobs_R, top_logprobs_RM, top_ids_RM, num_top_R), lengths)

    def fetch(self) -> dict[str, list[TokenLogprobs]]:
        """By request id, in the order of the prompt; waits for the device."""
        entries = iter(self.logprobs.fetch())
        return {
            request_id: [next(entries) for _ in range(length)]
            for request_id, length in self.lengths.items()
        }


def _asked_rows(step: ScheduledStep) -> tuple[list[int], list[int], list[int], dict[str, int]]:
    """Rows of the step that predict tokens of prompts, these tokens, how many of the likeliest are
    wanted beside each, and how many rows each sequence has."""
    rows: list[int] = []
    token_ids: list[int] = []
    num_top_R: list[int] = []
    lengths: dict[str, int] = {}
    first_row = 0
    for scheduled in step.sequences:
        sequence, num_top = scheduled.sequence, scheduled.sequence.params.prompt_logprobs
        if num_top is not None and (positions := scheduled.prompt_positions):
            rows += [first_row + position - scheduled.start for position in positions]
            token_ids += sequence.token_ids[positions.start + 1 : positions.stop + 1]
            num_top_R += [num_top] * len(positions)
            lengths[sequence.request_id] = len(positions)
        first_row += scheduled.num_tokens
    return rows, token_ids, num_top_R, lengths


def _of_rows(
    logits_RV: Tensor, token_ids_R: Tensor, num_top: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As many of the likeliest tokens as the row needs that asks for most."""
    return logprobs(logits_RV, token_ids_R, min(max(num_top), logits_RV.shape[1]))
