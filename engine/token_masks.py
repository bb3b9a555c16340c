"""Which tokens may be drawn for sequences that keep to a grammar, or whose thought has to end.

M sequences with a mask   V vocabulary   W words of 32 tokens, ⌈V / 32⌉
"""

import logging
from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from bezel.engine.errors import GrammarError
from bezel.engine.grammar import Mask
from bezel.engine.messages import FailureCause
from bezel.engine.sequence import Sequence
from bezel.kernels.sampling import to_device
from bezel.kernels.token_mask import apply_token_mask

logger = logging.getLogger("bezel")


class TokenMasks:
    """The masks of one step: made on the host, while the device computes the logits."""

    def __init__(
        self, bound: dict[int, Sequence], vocab_size: int, suppressed: Collection[int]
    ) -> None:
        """`bound` are the step's sequences that have a mask, by their rows; `suppressed` tokens
        are allowed to none."""
        self._rows = list(bound)
        self._mask_MW = np.zeros((len(bound), -(-vocab_size // 32)), dtype=np.int32)
        for mask_W, sequence in zip(self._mask_MW, bound.values(), strict=True):
            try:
                _fill(mask_W, sequence, suppressed)
            except GrammarError as error:
                ids = {"request_id": sequence.request_id}
                logger.warning("the grammar can't go on", extra=ids)
                # The reason may quote the output.
                logger.debug("the grammar can't go on: %s", error.message, extra=ids)
                mask_W[:] = 0

    @classmethod
    def of(
        cls, sequences: list[Sequence], vocab_size: int, suppressed: Collection[int] = ()
    ) -> "TokenMasks | None":
        """None if all of them are free to go on as they like."""
        bound = {row: sequence for row, sequence in enumerate(sequences) if sequence.is_bound}
        return cls(bound, vocab_size, suppressed) if bound else None

    def apply(self, logits_NV: Tensor) -> None:
        """Make the tokens that aren't allowed impossible, in place."""
        device = logits_NV.device
        rows_M, mask_MW = torch.tensor(self._rows), torch.from_numpy(self._mask_MW)
        apply_token_mask(logits_NV, to_device(rows_M, device), to_device(mask_MW, device))

    def checked(self, token_ids: list[int]) -> list[int | FailureCause]:
        """The tokens drawn, with the cause in the place of any that isn't allowed.

        Where no token is left, the grammar has failed, or wants what is never drawn; where there
        are some, the logits are no numbers.
        """
        checked: list[int | FailureCause] = [*token_ids]
        for row, mask_W in zip(self._rows, self._mask_MW, strict=True):
            token_id = token_ids[row]
            if not int(mask_W[token_id // 32]) >> token_id % 32 & 1:
                checked[row] = FailureCause.ENGINE if mask_W.any() else FailureCause.GRAMMAR
        return checked


def _fill(mask_W: Mask, sequence: Sequence, suppressed: Collection[int]) -> None:
    """A thought is closed as soon as the grammar lets it, and `min_tokens` bans stop tokens as long
    as there are others."""
    if sequence.grammar is None:
        mask_W[:] = -1
    else:
        sequence.grammar.fill_mask(mask_W)
    if suppressed:
        mask_W &= ~_bits(suppressed, len(mask_W))
    if sequence.forced_id is not None:
        forced_W = mask_W & _bits((sequence.forced_id,), len(mask_W))
        if forced_W.any():
            mask_W[:] = forced_W
            return
    if sequence.is_too_short:
        others_W = mask_W & ~_bits(sequence.stop_token_ids, len(mask_W))
        if others_W.any():
            mask_W[:] = others_W


def _bits(token_ids: Iterable[int], num_words: int) -> Mask:
    """A mask of these tokens."""
    bits_W = np.zeros(num_words, dtype=np.uint32)
    for token_id in token_ids:
        bits_W[token_id // 32] |= np.uint32(1 << token_id % 32)
    return bits_W.view(np.int32)
