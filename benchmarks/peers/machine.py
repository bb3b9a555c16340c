"""What processes use of this machine, from Linux's /proc: CPU seconds and resident memory."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of CPU since some start: of the whole machine, of two process trees, and of us."""

    all_s: float
    server_s: float
    idle_s: float
    client_s: float

    @classmethod
    def now(cls, server: int, idle: int | None) -> "CpuTimes":
        """`server` is the pid of the tree under load, `idle` that of the one which should rest."""
        idle_s = 0.0 if idle is None else tree_cpu_s(idle)
        return cls(busy_s(), tree_cpu_s(server), idle_s, sum(os.times()[:2]))

    def shares(self, later: "CpuTimes", wall_s: float) -> dict[str, float]:
        """Cores used on average in between. What nobody of ours used is `foreign`."""
        used = {
            "server": later.server_s - self.server_s,
            "idle": later.idle_s - self.idle_s,
            "client": later.client_s - self.client_s,
        }
        used["foreign"] = max(0.0, later.all_s - self.all_s - sum(used.values()))
        return {name: seconds / wall_s for name, seconds in used.items()}


def busy_s() -> float:
    """CPU seconds that all processes and the kernel have used; waiting and stolen time isn't."""
    user, nice, system, _, _, irq, softirq = map(int, _stat_line().split()[1:8])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


def tree(pid: int) -> list[int]:
    """A process and all that descend from it; none of them if it has ended."""
    children = defaultdict(list)
    for folder in PROC.iterdir():
        if folder.name.isdigit() and (fields := _fields(int(folder.name))):
            children[int(fields[1])].append(int(folder.name))
    found = [pid] if _fields(pid) else []
    for parent in found:
        found += children[parent]
    return found


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process tree, with those of children that have ended and been waited for."""
    ticks = sum(int(value) for p in tree(pid) for value in _fields(p)[11:15])
    return ticks / TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """PSS of a process tree: pages that processes share count once."""
    total = 0
    for process in tree(pid):
        try:
            text = (PROC / str(process) / "smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
    return total


def _stat_line() -> str:
    return (PROC / "stat").read_text().splitlines()[0]


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on: a name before it may contain spaces."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()
