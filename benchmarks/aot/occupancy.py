"""What a multiprocessor has, and how many blocks of a kernel it holds at once.

From "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide, and
from AMD's CDNA 3 instruction set architecture, where a multiprocessor is a compute unit, a warp a
wave, and a block a workgroup.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a multiprocessor has, in bytes, warps, blocks and columns of tensor memory."""

    shared_bytes: int
    max_block_shared_bytes: int
    max_warps: int
    max_blocks: int
    max_tensor_columns: int = 0


KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(164 * KIB, 163 * KIB, 64, 32),
    "sm_89": Architecture(100 * KIB, 99 * KIB, 48, 24),
    "sm_90": Architecture(228 * KIB, 227 * KIB, 64, 32),
    "sm_100": Architecture(228 * KIB, 227 * KIB, 64, 32, max_tensor_columns=512),
    "sm_120": Architecture(100 * KIB, 99 * KIB, 48, 24),
    "gfx942": Architecture(64 * KIB, 64 * KIB, 32, 32),
}


def blocks_at_once(
    architecture: str, registers: int, warps: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """Blocks of a kernel that one multiprocessor holds; 0 if not even one fits.

    A quarter of a multiprocessor has a quarter of the registers: on NVIDIA 16,384, given to warps
    of 32 threads in units of 256; on AMD 512 for each of a wave's lanes, in units of 8.
    """
    limits, is_amd = ARCHITECTURES[architecture], architecture.startswith("gfx")
    per_quarter = 512 // _up_to(registers, 8) if is_amd else 16_384 // _up_to(32 * registers, 256)
    blocks = min(min(4 * per_quarter, limits.max_warps) // warps, limits.max_blocks)
    # NVIDIA's system software keeps a KiB for itself for each block.
    block_bytes = shared_bytes if is_amd else _up_to(shared_bytes, 128) + KIB
    if block_bytes:
        blocks = min(blocks, limits.shared_bytes // block_bytes)
    if tensor_columns:
        blocks = min(blocks, limits.max_tensor_columns // tensor_columns)
    return blocks


def _up_to(number: int, unit: int) -> int:
    return -(-number // unit) * unit
