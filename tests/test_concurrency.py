"""The table of docs/memory.md is what its command computes, and that is what can be had by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import concurrency
from concurrency import KeysAndValues, Row

from bezel.engine.kv_layout import KVLayout, PageCount
from bezel.engine.model_config import ModelConfig
from bezel.engine.page_pool import PagePool
from bezel.engine.planning.published import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.model: row for row in concurrency.rows()}


def test_the_page_has_what_the_command_computes(rows: dict[str, Row]) -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert concurrency.tables(list(rows.values())) in page
    fewer = next(iter(concurrency.rows(step_tokens=2048)))
    assert f"with 2,048 it is {fewer.vllm_admission_bytes / GB:.2f} GB on 31B" in page


def test_31b_at_32k_by_hand(rows: dict[str, Row]) -> None:
    """50 local layers of 16 heads · 256, 10 global ones of 4 heads · 512, 2 bytes a number."""
    local, global_, n = 50 * 2 * 16 * 256 * 2, 10 * 2 * 4 * 512 * 2, 32_768
    assert (local, global_) == (819_200, 81_920)
    row = rows["gemma-4-31B"]
    assert row.full_length_bytes == (local + global_) * n == pytest.approx(29.5 * GB, rel=2e-3)
    assert row.vllm_steady_bytes == local * 1024 + global_ * n == pytest.approx(3.52 * GB, rel=2e-3)
    in_flight = 1023 + 2 * 8192
    assert row.vllm_admission_bytes == local * in_flight + global_ * n
    assert row.vllm_admission_bytes == pytest.approx(16.9 * GB, rel=3e-3)
    assert row.sglang_bytes == pytest.approx((0.8 * local + global_) * n)
    assert row.sglang_bytes == pytest.approx(24.2 * GB, rel=3e-3)
    # A window that starts within a page has a local page more than fill it.
    assert row.bezel_bytes == local * (1024 + 16) + global_ * n * 640 // 1024
    assert row.bezel_bytes == pytest.approx(2.52 * GB, rel=6e-3)


def test_layers_that_share_keys_and_values_keep_none() -> None:
    """E4B: 24 of 42 layers own any, 20 local with a window of 512 and 4 global, 2 heads."""
    peers = KeysAndValues.of(ModelConfig.from_hf(PUBLISHED["gemma-4-E4B"]))
    assert peers == KeysAndValues(20 * 2 * 2 * 256 * 2, 4 * 2 * 2 * 512 * 2, 512)


@pytest.mark.parametrize("name", concurrency.MODELS)
def test_so_many_of_bezels_are_what_a_pool_lends(name: str, rows: dict[str, Row]) -> None:
    row = rows[name]
    layout = KVLayout.for_model(ModelConfig.from_hf(PUBLISHED[name]), 2, 16)
    peak = layout.peak_pages(row.context)
    pool = PagePool(layout, row.pool_bytes)
    num = row.bezel_sequences
    assert pool.can_allocate(PageCount(num * peak.local, num * peak.global_))
    assert not pool.can_allocate(PageCount((num + 1) * peak.local, (num + 1) * peak.global_))


def test_vllm_admits_the_last_beside_those_that_run(rows: dict[str, Row]) -> None:
    for row in rows.values():
        num, steady = row.vllm_one_by_one_sequences, row.vllm_steady_bytes
        beside = row.vllm_admission_bytes + (num - 1) * steady
        assert num == 0 or beside <= row.pool_bytes < beside + steady
        assert row.vllm_at_once_sequences <= num <= row.vllm_steady_sequences


def test_a_short_prompt_has_no_window_yet() -> None:
    """Fewer tokens than the window: all that there are, and nothing more is asked for."""
    peers = KeysAndValues.of(ModelConfig.from_hf(PUBLISHED["gemma-4-31B"]))
    assert peers.windowed(100) == peers.vllm_admission(100, 8192) == peers.full_length(100)


def test_models_that_do_not_go_so_far_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["concurrency.py", "--context", "262144", "--json"])
        concurrency.main()
    printed = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in printed] == concurrency.MODELS[:3]
    assert printed[0]["bezel_bytes"] == pytest.approx(14.3 * GB, rel=3e-3)
