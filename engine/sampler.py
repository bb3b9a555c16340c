"""From logits to one token per sequence: penalties, biases, bans and masks first, then the draw.

N sampled sequences   V vocabulary   E edits, each of one logit of one row
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bezel.engine.logprobs import DeviceLogprobs, RawLogits
from bezel.engine.messages import FailureCause, TokenLogprobs
from bezel.engine.sequence import Sequence
from bezel.engine.token_masks import TokenMasks
from bezel.kernels.logits import edit_logits
from bezel.kernels.sampling import sample, to_device


@dataclass(frozen=True, slots=True)
class Draws:
    """What was drawn for each sequence of a step, still on the device."""

    token_ids_N: Tensor
    masks: TokenMasks | None
    logprobs: DeviceLogprobs | None
    rows: list[int]  # which have log-probabilities

    def fetch(self) -> tuple[list[int | FailureCause], dict[int, TokenLogprobs]]:
        """The tokens, and by row the log-probabilities of those that ask; waits for the device.

        A cause stands for a token that the sequence's mask doesn't allow.
        """
        drawn: list[int] = self.token_ids_N.tolist()
        masks = self.masks
        token_ids = list[int | FailureCause](drawn) if masks is None else masks.checked(drawn)
        logprobs = [] if self.logprobs is None else self.logprobs.fetch()
        return token_ids, dict(zip(self.rows, logprobs, strict=True))


class Sampler:
    """`suppressed` tokens, named by the checkpoint, are never drawn."""

    def __init__(self, suppressed: list[int], vocab_size: int) -> None:
        self._suppressed_ids = [token_id for token_id in suppressed if token_id < vocab_size]
        self._suppressed = torch.tensor(self._suppressed_ids, dtype=torch.int64)

    def draw(self, logits_NV: Tensor, sequences: list[Sequence]) -> Draws:
        """Draw a token per row; nothing here waits for the device.

        `logits_NV` (float32, contiguous) is changed in place.
        """
        masks = TokenMasks.of(sequences, logits_NV.shape[1], self._suppressed_ids)
        if all(sequence.params.logprobs is None for sequence in sequences):
            return Draws(self.sample(logits_NV, sequences, masks), masks, None, [])
        changes = masks is not None or len(self._suppressed) > 0 or any(map(_has_edits, sequences))
        raw = RawLogits.keep(logits_NV, sequences, changes)
        token_ids_N = self.sample(logits_NV, sequences, masks)
        return Draws(token_ids_N, masks, raw.logprobs(token_ids_N), raw.rows)

    def sample(
        self, logits_NV: Tensor, sequences: list[Sequence], masks: TokenMasks | None = None
    ) -> Tensor:
        """One token id (int64) per row, still on the device: nothing here waits for it.

        `logits_NV` (float32, contiguous) is changed in place.
        """
        edited = [(row, s) for row, s in enumerate(sequences) if _has_edits(s)]
        if edited:
            positions_E, values_3E = _packed_edits(edited, logits_NV.shape[1])
            device = logits_NV.device
            edit_logits(logits_NV, to_device(positions_E, device), to_device(values_3E, device))
        if len(self._suppressed):
            self._suppressed = self._suppressed.to(logits_NV.device)  # moves once
            logits_NV.index_fill_(1, self._suppressed, -torch.inf)
        if masks is not None:
            masks.apply(logits_NV)
        params = [sequence.params for sequence in sequences]
        return sample(
            logits_NV,
            temperature=[0.0 if p.is_greedy else p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            seed=[sequence.seed for sequence in sequences],
            position=[sequence.num_tokens for sequence in sequences],
        )


def _bans_stop_tokens(sequence: Sequence) -> bool:
    """Masks do so themselves: they know whether any other token is left."""
    return sequence.is_too_short and len(sequence.stop_token_ids) > 0 and not sequence.is_bound


def _has_edits(sequence: Sequence) -> bool:
    params = sequence.params
    has_penalty = bool(params.presence_penalty or params.frequency_penalty)
    return (
        params.repetition_penalty != 1.0
        or (has_penalty and len(sequence.output_counts) > 0)
        or len(params.logit_bias) > 0
        or _bans_stop_tokens(sequence)
    )


def _edits(sequence: Sequence) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Penalties as OpenAI and vLLM define them, the bias, and `min_tokens`' ban of stop tokens:
    token ids_E, and values_3E as `edit_logits` takes them."""
    params = sequence.params
    presence, frequency = params.presence_penalty, params.frequency_penalty
    counts = sequence.output_counts if presence or frequency else {}
    banned = sequence.stop_token_ids if _bans_stop_tokens(sequence) else frozenset()
    ids = dict.fromkeys(sequence.token_ids if params.repetition_penalty != 1.0 else ())
    num_seen = len(ids)
    ids.update(dict.fromkeys(chain(counts, params.logit_bias, banned)))
    values_3E = np.zeros((3, len(ids)), dtype=np.float32)
    values_3E[0] = 1.0
    values_3E[0, :num_seen] = params.repetition_penalty
    if counts:
        values_3E[1] = [presence + frequency * counts[i] if i in counts else 0.0 for i in ids]
    if params.logit_bias or banned:
        bias = params.logit_bias
        values_3E[2] = [-np.inf if i in banned else bias.get(i, 0.0) for i in ids]
    return np.fromiter(ids, dtype=np.int64, count=len(ids)), values_3E


def _packed_edits(edited: list[tuple[int, Sequence]], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Edits of some rows together, padded, as `edit_logits` takes them."""
    edits = [(row * vocab_size, *_edits(sequence)) for row, sequence in edited]
    padding = -sum(len(ids_E) for _, ids_E, _ in edits) % 16
    positions = [start + ids_E for start, ids_E, _ in edits] + [np.full(padding, -1)]
    values = [values_3E for _, _, values_3E in edits] + [np.zeros((3, padding), np.float32)]
    return torch.from_numpy(np.concatenate(positions)), torch.from_numpy(np.concatenate(values, 1))
