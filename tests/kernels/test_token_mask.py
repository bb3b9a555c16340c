"""Masks of forbidden tokens, bit by bit."""

import pytest
import torch
from torch import Tensor

from bezel.kernels.token_mask import apply_token_mask


def words_of(allowed: list[set[int]], num_words: int) -> Tensor:
    """A mask for each set of tokens, as int32 words of 32 tokens."""
    words = [[sum(1 << i for i in range(32) if 32 * w + i in tokens) for w in range(num_words)]
             for tokens in allowed]  # fmt: skip
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 70, 300])
def test_only_what_a_mask_allows_keeps_its_logit(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits_NV = torch.randn(5, vocab_size, generator=generator)
    before_NV = logits_NV.clone()
    allowed = [
        {0, 31, 32, 63, vocab_size - 1},
        set(torch.randperm(vocab_size, generator=generator)[: vocab_size // 2].tolist()),
        set(),
    ]
    mask_MW = words_of(allowed, -(-vocab_size // 32))
    apply_token_mask(logits_NV, torch.tensor([3, 0, 2]), mask_MW)
    for row, tokens in zip([3, 0, 2], allowed, strict=True):
        for token in range(vocab_size):
            expected = before_NV[row, token].item() if token in tokens else -torch.inf
            assert logits_NV[row, token].item() == expected
    assert torch.equal(logits_NV[[1, 4]], before_NV[[1, 4]])


def test_padding_and_no_masks_at_all_change_nothing() -> None:
    logits_NV = torch.randn(2, 40)
    before_NV = logits_NV.clone()
    apply_token_mask(logits_NV, torch.tensor([-1, -1]), torch.zeros(2, 2, dtype=torch.int32))
    apply_token_mask(logits_NV, torch.tensor([]).long(), torch.zeros(0, 2, dtype=torch.int32))
    assert torch.equal(logits_NV, before_NV)


def test_what_was_forbidden_before_stays_so() -> None:
    logits_NV = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    apply_token_mask(logits_NV, torch.tensor([0]), words_of([{1, 2}], 1))
    assert logits_NV.tolist() == [[-torch.inf, 1.0, -torch.inf]]
