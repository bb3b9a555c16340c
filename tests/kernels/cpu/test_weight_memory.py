"""Memory for weights: nobody else's bytes, whole cache lines, pages that may be huge."""

import sys
from pathlib import Path

import pytest

from bezel.kernels.cpu.weight_memory import HUGE_PAGE, SLAB_BYTES, WeightMemory

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
SHAPES = [(3, 100), (1, 1), (7, 4096), (SLAB_BYTES // 2,), (SLAB_BYTES // 2 + 1,), (SLAB_BYTES,)]


def test_tensors_share_no_byte() -> None:
    memory = WeightMemory()
    tensors = [memory.empty(*shape).fill_(i) for i, shape in enumerate(SHAPES)]
    for i, (tensor, shape) in enumerate(zip(tensors, SHAPES, strict=True)):
        assert tensor.shape == shape and bool((tensor == i).all())
        assert tensor.data_ptr() % 64 == 0


def test_small_ones_stand_side_by_side() -> None:
    memory = WeightMemory()
    first, second = memory.empty(100), memory.empty(28)
    assert second.data_ptr() - first.data_ptr() == 128


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the system has no huge pages to ask for")
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' list of mappings")
@pytest.mark.parametrize("num_bytes", [100, SLAB_BYTES + 5])
def test_huge_pages_are_asked_for(num_bytes: int) -> None:
    tensor = WeightMemory().empty(num_bytes)
    assert tensor.data_ptr() % HUGE_PAGE == 0
    access, flags = mapping_of(tensor.data_ptr())
    assert access == "rw-p" and "hg" in flags  # shared memory has a setting of its own


def mapping_of(address: int) -> tuple[str, list[str]]:
    """Access and `VmFlags` of the mapping that has an address."""
    access = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *words = line.split()
        if not key.endswith(":"):
            first, _, end = key.partition("-")
            access = words[0] if int(first, 16) <= address < int(end, 16) else ""
        elif access and key == "VmFlags:":
            return access, words
    raise AssertionError("no such mapping")
