"""Puts load on one server and measures: a cell, or the way from its start to a first token."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import httpx
from peers.cells import Cell
from peers.machine import CpuTimes
from peers.servers import MODEL_NAME, Server

from bezel.server.benchmarking.load import Load
from bezel.server.benchmarking.measure import Asker, Measurement, Message

RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class GreedyAsker(Asker):
    """Asks for the most likely token each time; other servers have other defaults."""

    def _request(self, messages: Sequence[Message]) -> tuple[str, dict[str, Any]]:
        path, body = super(GreedyAsker, self)._request(messages)
        return path, body | {"temperature": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One cell of one server. Times are medians of its requests; `cpu` is in cores."""

    server: str
    cell: str
    pair: int
    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    wall_s: float
    cpu: dict[str, float]


def measure_cell(
    cell: Cell, pair: int, server: Server, idle: Server, prompts: Sequence[str], timeout_s: float
) -> CellResult:
    """Ask everything of a cell; `idle` is the other server, which is paused meanwhile.

    Raises:
        SystemExit: a server has ended, or a request failed or was answered with other lengths.
    """
    before = CpuTimes.now(server.pid, idle.pid)
    started_s = time.perf_counter()
    with idle.paused():
        measurements = asyncio.run(_ask_all(cell, server, prompts, timeout_s))
    wall_s = time.perf_counter() - started_s
    cpu = before.shares(CpuTimes.now(server.pid, idle.pid), wall_s)
    for one in (server, idle):
        one.check()
    _check(cell, server, measurements)
    output_tokens = sum(m.output_tokens for m in measurements)
    span_s = max(m.ended_s for m in measurements) - min(m.sent_s for m in measurements)
    return CellResult(
        server=server.name,
        cell=cell.name,
        pair=pair,
        ttft_s=statistics.median(m.ttft_s or 0.0 for m in measurements),
        tpot_s=statistics.median(m.tpot_s or 0.0 for m in measurements),
        output_tokens_per_s=output_tokens / span_s,
        prompt_tokens=sum(m.prompt_tokens or 0 for m in measurements),
        output_tokens=output_tokens,
        cached_tokens=sum(m.cached_tokens or 0 for m in measurements),
        wall_s=wall_s,
        cpu=cpu,
    )


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the start of a process until it streamed a token, and cores used meanwhile."""

    seconds: float
    cpu: dict[str, float]


def measure_start(server: Server, idle: Server | None, prompt: str, timeout_s: float) -> Start:
    """Ask a server that has just been started, until it answers; `idle` is paused meanwhile.

    Raises:
        SystemExit: the server has ended, or there is no token after `timeout_s`.
    """
    pids = (server.pid, None if idle is None else idle.pid)
    before = CpuTimes.now(*pids)
    with (
        nullcontext() if idle is None else idle.paused(),
        httpx.Client(base_url=server.url, timeout=timeout_s, trust_env=False) as client,
    ):
        while time.perf_counter() - server.started_s < timeout_s:
            server.check()
            if _streams(client, prompt):
                seconds = time.perf_counter() - server.started_s
                return Start(seconds, before.shares(CpuTimes.now(*pids), seconds))
            time.sleep(RETRY_S)
    raise SystemExit(f"{server.name} gave no token within {timeout_s:g} s of its start")


def _streams(client: httpx.Client, prompt: str) -> bool:
    """Whether the server has begun to answer."""
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines() if response.status_code == 200 else iter(())
            return any(line.startswith("data:") for line in lines)
    except httpx.TransportError:
        return False


async def _ask_all(
    cell: Cell, server: Server, prompts: Sequence[str], timeout_s: float
) -> list[Measurement]:
    most = cell.concurrency
    async with httpx.AsyncClient(
        base_url=server.url,
        timeout=None,
        # llama-server closes idle connections just when they are wanted again.
        limits=httpx.Limits(max_connections=most, max_keepalive_connections=0),
        trust_env=False,
    ) as client:
        asker = GreedyAsker(
            client=client,
            endpoint="completions",
            model=MODEL_NAME,
            output_len=cell.output_len,
            ignore_eos=True,
            timeout_s=timeout_s,
            clock=time.perf_counter,
        )
        load = Load([[prompt] for prompt in prompts], [0.0] * len(prompts), most)
        await load.run(asker.ask)
    return load.measurements


def _check(cell: Cell, server: Server, measurements: Sequence[Measurement]) -> None:
    for measured in measurements:
        if measured.error is not None:
            reason = f"{measured.error} {measured.detail}".rstrip()
            raise SystemExit(f"{server.name}, {cell.name}: {reason}")
        lengths = (measured.prompt_tokens, measured.output_tokens)
        if lengths != (cell.input_len, cell.output_len) or measured.ttft_s is None:
            wanted = (cell.input_len, cell.output_len)
            raise SystemExit(f"{server.name}, {cell.name}: {lengths} tokens instead of {wanted}")
