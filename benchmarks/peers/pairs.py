"""The order of everything: A B A B …, one server under load while the other waits.

A pair is every cell, first of Bezel, then of the peer. The first pairs start both servers anew:
their time to a first token, and the memory of a server that has just begun, belong to those. Later
pairs go on with the servers that are up.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from peers.cells import CELLS, MEMORY_AFTER, Cell, prompts_of
from peers.drive import CellResult, measure_cell, measure_start
from peers.machine import resident_bytes
from peers.prompts import Decode, Encode
from peers.ratios import Value, values_of
from peers.servers import Recipe, Server, running

FIRST_START, LATER_START = "start to first token, the first", "start to first token, later"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. `num_starts` pairs begin with a start; no pair begins after `limit_s`."""

    recipes: tuple[Recipe, Recipe]
    folder: Path
    num_pairs: int
    num_starts: int
    limit_s: float
    request_timeout_s: float
    start_timeout_s: float
    encode: Encode
    decode: Decode
    cells: Sequence[Cell] = CELLS


@dataclass(slots=True)
class Run:
    """Measurements so far; they can be read whenever the run ends."""

    plan: Plan
    say: Callable[[str], object]
    values: list[Value] = field(default_factory=list)
    results: list[CellResult] = field(default_factory=list)
    _started_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Everything, or what fits into the limit.

        Raises:
            SystemExit: a server doesn't start, ends, or answers with an error.
        """
        plan = self.plan
        with ExitStack() as stack:
            servers: tuple[Server, ...] = ()
            for pair in range(plan.num_pairs):
                if self._is_late():
                    return
                is_start = pair < plan.num_starts
                if is_start:
                    stack.close()
                    servers = self._start(pair, stack)
                self._pair(pair, servers, is_start)

    def _is_late(self) -> bool:
        is_late = time.monotonic() - self._started_s > self.plan.limit_s
        if is_late:
            self.say(f"stopped: {self.plan.limit_s:g} s are over")
        return is_late

    def _start(self, pair: int, stack: ExitStack) -> tuple[Server, ...]:
        """Both servers one after the other, each alone at work until its first token."""
        plan, servers = self.plan, list[Server]()
        for recipe in plan.recipes:
            prompt = self._prompts(plan.cells[0].warm_up(), pair)[0]
            server = stack.enter_context(running(recipe, plan.folder))
            idle = servers[0] if servers else None
            start = measure_start(server, idle, prompt, plan.start_timeout_s)
            figure = LATER_START if pair else FIRST_START
            cpu = (start.cpu["foreign"], start.cpu["idle"])
            self.values.append(Value(figure, "s", server.name, pair, start.seconds, *cpu))
            self.say(f"pair {pair}  {server.name:10} first token {start.seconds:.2f} s from start")
            servers.append(server)
        return tuple(servers)

    def _pair(self, pair: int, servers: tuple[Server, ...], is_start: bool) -> None:
        for cell in self.plan.cells:
            prompts = self._prompts(cell, pair)
            warm_up = cell.warm_up()
            for server, idle in (servers, servers[::-1]):
                if is_start:
                    texts = self._prompts(warm_up, pair)
                    self._measure(warm_up, pair, server, idle, texts)
                result = self._measure(cell, pair, server, idle, prompts)
                self.results.append(result)
                self.values += values_of(cell, result)
                self.say(_line(result))
                if is_start and cell.name in MEMORY_AFTER:
                    num_bytes = resident_bytes(server.pid)
                    figure = f"resident after {cell.name}"
                    value = Value(figure, "MB", server.name, pair, num_bytes / 1e6)
                    self.values.append(value)

    def _measure(
        self, cell: Cell, pair: int, server: Server, idle: Server, prompts: Sequence[str]
    ) -> CellResult:
        timeout_s = self.plan.request_timeout_s
        return measure_cell(cell, pair, server, idle, prompts, timeout_s)

    def _prompts(self, cell: Cell, pair: int) -> list[str]:
        return prompts_of(cell, pair, self.plan.encode, self.plan.decode)


def _line(result: CellResult) -> str:
    cpu = ", ".join(f"{name} {cores:.2f}" for name, cores in result.cpu.items())
    return (
        f"pair {result.pair}  {result.server:10} {result.cell:12} "
        f"{result.output_tokens_per_s:8.1f} tokens/s  first {1e3 * result.ttft_s:8.1f} ms  "
        f"then {1e3 * result.tpot_s:6.1f} ms  cached {result.cached_tokens:6,}  cores: {cpu}"
    )
