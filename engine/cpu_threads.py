"""How many threads a computation on the CPU gets: one for each core that is really ours.

A container may be tied to some cores of a machine, or be given a share of time on all of them, as
with `docker run --cpus 2`. Threads beyond either only wait for each other.
"""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def num_threads(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may run on, or that its cgroup's time adds up to if those are fewer.

    Part of a core is none, unless it is all there is. `cgroups` is where these are mounted.
    """
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    quota = _quota(cgroups)
    return num_cores if quota is None else max(1, min(num_cores, int(quota)))


def _quota(cgroups: Path) -> float | None:
    """Cores' worth of time, or None without a limit. Inside a container its own group is the root
    of what it sees."""
    try:
        quota_us, period_us = _read_v2(cgroups) or _read_v1(cgroups / "cpu")
        return int(quota_us) / int(period_us) if int(quota_us) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _read_v2(cgroups: Path) -> tuple[str, str] | None:
    path = cgroups / "cpu.max"
    if not path.exists():
        return None
    quota_us, period_us = path.read_text(encoding="ascii").split()
    return quota_us, period_us


def _read_v1(group: Path) -> tuple[str, str]:
    files = (group / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
    quota_us, period_us = (file.read_text(encoding="ascii").strip() for file in files)
    return quota_us, period_us
