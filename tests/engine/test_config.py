"""Settings that depend on where the model runs."""

import pytest

from bezel.engine.config import EngineConfig


@pytest.mark.parametrize(("is_gpu", "num_tokens"), [(True, 16), (False, 8)])
def test_pages_are_smaller_on_a_cpu_unless_told(is_gpu: bool, num_tokens: int) -> None:
    assert EngineConfig().local_page_size(is_gpu) == num_tokens
    assert EngineConfig(block_size=32).local_page_size(is_gpu) == 32
