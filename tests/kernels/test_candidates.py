"""The k largest logits in rank order, by a sort of pairs."""

import pytest
import torch

from bezel.kernels.candidates import largest


@pytest.mark.parametrize(
    ("vocab_size", "k"),
    [(300, 1), (300, 299), (300, 300), (8192, 8), (8192, 128), (8192, 129), (10_000, 64)],
)
@pytest.mark.parametrize("num_values", [1, 3, 200, None])
def test_largest(vocab_size: int, k: int, num_values: int | None) -> None:
    """All equal, a few values with −0 and 0 among them, many with ties, and all different; both
    with blocks that can be left out and without."""
    generator = torch.Generator().manual_seed(k)
    logits_SV = torch.randn(3, vocab_size, generator=generator)
    if num_values is not None:
        values = torch.arange(num_values) - num_values // 2 + 0.0
        which = torch.randint(0, num_values, (3, vocab_size), generator=generator)
        logits_SV = values[which] * torch.where(torch.rand(3, vocab_size) < 0.5, -1.0, 1.0)
    values_SK, ids_SK = largest(logits_SV, k)
    for row, values_K, ids_K in zip(logits_SV, values_SK, ids_SK, strict=True):
        pairs = sorted(zip((-row).tolist(), range(vocab_size), strict=True))[:k]
        assert ids_K.tolist() == [token for _, token in pairs]
        assert values_K.tolist() == [-value for value, _ in pairs]
