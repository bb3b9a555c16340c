"""What a machine has and does: memory, bandwidth and FLOP/s of its data sheet, and what kernels are
likely to get of them, which is an estimate and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or the cores of one CPU.

    `memory_bytes`, `bytes_per_s` and `flops_per_s` (bfloat16, dense) are its maker's. Estimates
    are the shares of bandwidth and of FLOP/s that kernels reach, and the time a step takes beside
    them: launches, sampling, the scheduler.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: float
    memory_efficiency: float
    compute_efficiency: float
    step_overhead_s: float
    is_gpu: bool = True


# GPUs: NVIDIA's data sheets, where bfloat16 FLOP/s are given with sparsity, which is twice as much.
# The shares are what good kernels of these shapes are reported to reach (experts in bfloat16 on an
# H200: 63 to 81 % of its bandwidth from 8 tokens on, https://github.com/vllm-project/vllm/pull/44818).
PRESETS: Mapping[str, Device] = {
    # https://www.nvidia.com/en-us/data-center/h100
    "h100": Device(
        name="H100 SXM",
        memory_bytes=80 * 10**9,
        bytes_per_s=3.35e12,
        flops_per_s=989e12,
        memory_efficiency=0.7,
        compute_efficiency=0.5,
        step_overhead_s=2e-3,
    ),
    # https://www.nvidia.com/en-us/data-center/h200
    "h200": Device(
        name="H200 SXM",
        memory_bytes=141 * 10**9,
        bytes_per_s=4.8e12,
        flops_per_s=989e12,
        memory_efficiency=0.7,
        compute_efficiency=0.5,
        step_overhead_s=2e-3,
    ),
    # https://www.nvidia.com/en-us/data-center/hgx: eight of them are 1.4 TB, 64 TB/s, 36 PFLOP/s
    # with sparsity.
    "b200": Device(
        name="B200",
        memory_bytes=180 * 10**9,
        bytes_per_s=8e12,
        flops_per_s=2.25e15,
        memory_efficiency=0.7,
        compute_efficiency=0.5,
        step_overhead_s=2e-3,
    ),
    # Two cores of a server with AVX-512 bfloat16: 82 GB/s by a sum over 256 MB, and what torch's
    # products of many rows reach, is their peak here; both measured, not a maker's.
    "cpu": Device(
        name="2 CPU cores",
        memory_bytes=16 * 2**30,
        bytes_per_s=82e9,
        flops_per_s=700e9,
        memory_efficiency=0.5,
        compute_efficiency=0.6,
        step_overhead_s=3e-3,
        is_gpu=False,
    ),
}
