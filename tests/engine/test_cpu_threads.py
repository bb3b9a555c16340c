"""Threads by cores and by the quota of a cgroup."""

import os
from pathlib import Path

import pytest

from bezel.engine.cpu_threads import num_threads


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def test_without_a_quota_there_is_a_thread_for_each_allowed_core(tmp_path: Path) -> None:
    assert num_threads(tmp_path) == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("290000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("10000 5000\n", 2),
        ("nonsense\n", 8),
        ("100000 0\n", 8),
    ],
)
def test_a_quota_of_the_second_version_is_rounded_down(
    tmp_path: Path, text: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert num_threads(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3), ("1", 1)])
def test_a_quota_of_the_first_version_counts_too(tmp_path: Path, quota: str, expected: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert num_threads(tmp_path) == expected


def test_where_affinity_is_unknown_all_cores_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert num_threads(tmp_path) == 4
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_threads(tmp_path) == 1
