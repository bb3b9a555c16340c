"""Kernels for CPUs share their work between two threads, whatever the machine has."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares that aren't alike, of which two are one thread's."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
