"""As many open files as connections need, where the system lets us."""

import resource
from typing import Any

import pytest

from bezel.server.open_files import allow_connections


@pytest.mark.parametrize(
    ("soft", "hard", "becomes", "is_told"),
    [
        (1024, 1_000_000, (2256, 1_000_000), False),
        (1024, resource.RLIM_INFINITY, (2256, resource.RLIM_INFINITY), False),
        (1024, 2000, (2000, 2000), True),
        (4096, 8192, None, False),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, False),
    ],
)
def test_limits(
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    soft: int,
    hard: int,
    becomes: tuple[int, int] | None,
    is_told: bool,
) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: made.append(limits))
    allow_connections(2000)
    assert made == ([] if becomes is None else [becomes])
    assert ("--max-connections" in caplog.text) == is_told
