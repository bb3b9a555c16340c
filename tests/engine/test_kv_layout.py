"""Bytes per sequence of the published models, from the allocator's own arithmetic."""

import pytest

from bezel.engine.kv_layout import KVLayout
from bezel.engine.model_config import ModelConfig

K = 1024
# Bytes a token of all owning layers takes in bfloat16: local layers keep K and V of 256 values,
# global layers K and V of 512, or 640 values where K is a function of V.
#            local bytes/token     global bytes/token    window
BYTES = {
    "E2B": (12 * 1 * 2 * 256 * 2, 3 * 1 * 2 * 512 * 2, 512),
    "E4B": (20 * 2 * 2 * 256 * 2, 4 * 2 * 2 * 512 * 2, 512),
    "12B": (40 * 8 * 2 * 256 * 2, 8 * 1 * 640 * 2, 1024),
    "26B-A4B": (25 * 8 * 2 * 256 * 2, 5 * 2 * 640 * 2, 1024),
    "31B": (50 * 16 * 2 * 256 * 2, 10 * 4 * 640 * 2, 1024),
}


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("num_tokens", [8 * K, 32 * K, 128 * K, 256 * K])
def test_bytes_per_sequence(name: str, num_tokens: int, real_configs: dict[str, dict]) -> None:
    """At page boundaries a sequence takes window × local + length × global bytes, exactly."""
    local, global_, window = BYTES[name]
    layout = KVLayout.for_model(ModelConfig.from_hf(real_configs[name]), 2, 16)
    held = layout.num_bytes(layout.pages(num_tokens))
    assert held == window * local + num_tokens * global_
    peak = layout.num_bytes(layout.peak_pages(num_tokens))
    assert peak == held + 16 * local, "one page more, when the window starts inside a page"


def test_31b_at_256k_takes_14_3_gb(real_configs: dict[str, dict]) -> None:
    layout = KVLayout.for_model(ModelConfig.from_hf(real_configs["31B"]), 2, 16)
    assert layout.num_bytes(layout.pages(256 * K)) == 14_260_633_600
    full_length = 256 * K * (50 * 16 * 2 * 256 * 2 + 10 * 4 * 2 * 512 * 2)
    assert full_length == 236_223_201_280


@pytest.mark.parametrize(
    ("name", "local_page", "global_page", "locals_per_sector", "globals_per_sector"),
    [
        ("31B", 13_107_200, 3_276_800, 1, 4),
        ("26B-A4B", 3_276_800, 819_200, 1, 4),
        ("12B", 5_242_880, 655_360, 1, 8),
        ("E4B", 655_360, 1_048_576, 8, 5),
        ("E2B", 196_608, 393_216, 2, 1),
    ],
)
def test_pages_nest_in_sectors(
    name: str,
    local_page: int,
    global_page: int,
    locals_per_sector: int,
    globals_per_sector: int,
    real_configs: dict[str, dict],
) -> None:
    layout = KVLayout.for_model(ModelConfig.from_hf(real_configs[name]), 2, 16)
    assert (layout.local_page_bytes, layout.global_page_bytes) == (local_page, global_page)
    assert layout.local_pages_per_sector == locals_per_sector
    assert layout.global_pages_per_sector == globals_per_sector
