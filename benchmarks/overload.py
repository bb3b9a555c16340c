"""A server that is asked for more than it can do: `python benchmarks/overload.py [MODEL]`.

Starts one with --seats and a queue of --queue, and measures it:

    peak      the next request as soon as one ends, so many at once, at the best of several numbers;
              the first ones come one after the other, for in step they would be computed together
              throughout, which requests of many clients are not
    overload  requests come as a Poisson process, --overload times as many as are answered at the
              peak, whatever becomes of those before them
    peak      once more, for a machine isn't equally fast for minutes: what counts is their mean

Goodput is requests a second that are answered in full within the objectives. The time before the
server is as busy as it gets, the first quarter or 15 s, doesn't count.

Every tenth of those who are refused comes back, once, when `Retry-After` says; so few that they
don't change the load. Beside the share of them that is let in stands that of all who come: in a
crowd that doesn't end it is the most that anybody can be promised. Those who come back after its
end, in the order in which they were told to, should all be let in.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from lean_transport import LeanTransport
from peers.machine import resident_bytes
from peers.servers import MODEL_NAME, Recipe, Server, bezel, running

from bezel.engine.simulation.results import Distribution
from bezel.server.benchmarking.load import Load
from bezel.server.benchmarking.measure import Asker, Measurement, Message
from bezel.server.benchmarking.results import results_of
from bezel.server.benchmarking.settings import ServeBenchmark
from bezel.server.benchmarking.workloads import arrivals, conversations

RAMP_S = 15.0
SPREAD_S = 0.1  # between the first requests at the peak: answers take longer than all of them
COMES_BACK = 10  # one of so many that are refused
START_TIMEOUT_S = 300.0
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What was measured within a window of `seconds`. Goodput is in requests a second; `errors` are
    of requests that ended badly, by kind."""

    seconds: float
    goodput: float
    num_asked: int
    num_answered: int
    ttft_s: Distribution | None
    errors: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Returns:
    """Of those that were told to come back: how many did, and how many were let in then, while the
    load went on and after it; and the share of all requests that was let in."""

    num_during: int
    num_let_in_during: int
    num_after: int
    num_let_in_after: int
    share_let_in_of_all: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Memory is in bytes, of both processes: before and after the overload."""

    at_once: int
    peak: Phase
    peak_after: Phase
    offered: float
    overload: Phase
    returns: Returns
    bytes_before: int
    bytes_after: int

    @property
    def share_of_peak(self) -> float:
        return 2 * self.overload.goodput / (self.peak.goodput + self.peak_after.goodput)


class Crowd:
    """Asks for others; of those that are refused every `COMES_BACK`-th comes again when told to."""

    def __init__(
        self,
        ask: Callable[[Sequence[Message]], Awaitable[Measurement]],
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._ask, self._sleep = ask, sleep
        self._num_refused = 0
        self.returned: list[Measurement] = []

    async def ask(self, messages: Sequence[Message]) -> Measurement:
        """Ask once, or wait and ask once more; returns how it went the first time."""
        measured = await self._ask(messages)
        if measured.retry_after_s is not None:
            self._num_refused += 1
            if self._num_refused % COMES_BACK == 0:
                await self._sleep(measured.retry_after_s)
                self.returned.append(await self._ask(messages))
        return measured

    def returns(self, ended_s: float, phase: Phase) -> Returns:
        """Who came back before and after the load ended, at that time of the clock."""
        during = [m.error is None for m in self.returned if m.sent_s < ended_s]
        after = [m.error is None for m in self.returned if m.sent_s >= ended_s]
        return Returns(
            num_during=len(during),
            num_let_in_during=sum(during),
            num_after=len(after),
            num_let_in_after=sum(after),
            share_let_in_of_all=phase.num_answered / max(1, phase.num_asked),
        )


def phase_of(
    benchmark: ServeBenchmark, measurements: Sequence[Measurement], begin_s: float, end_s: float
) -> Phase:
    """Of what ended between two times of the clock; the rest is of another time."""
    ended = [m for m in measurements if begin_s <= m.ended_s < end_s]
    results = results_of(benchmark, ended, 0, begin_s)
    assert results.goodput is not None
    return Phase(
        seconds=end_s - begin_s,
        goodput=results.goodput.share * len(ended) / (end_s - begin_s),
        num_asked=len(ended),
        num_answered=results.num_answered,
        ttft_s=results.ttft_s,
        errors=results.errors,
    )


async def measure_peak(
    ask: Callable[[Sequence[Message]], Awaitable[Measurement]],
    benchmark: ServeBenchmark,
    at_once: int,
    seconds: float,
) -> Phase:
    """So many requests at once, for so long; those still under way then are given up."""
    talks = conversations(benchmark)
    due_s = [SPREAD_S * min(index, at_once) for index in range(len(talks))]
    load = Load(talks, due_s, at_once)
    try:
        async with asyncio.timeout(seconds):
            await load.run(ask)
        raise SystemExit(f"{len(talks)} requests are too few for {seconds:g} s")
    except TimeoutError:
        pass
    begin_s = load.started_s + min(RAMP_S, seconds / 4)
    return phase_of(benchmark, load.measurements, begin_s, load.started_s + seconds)


async def measure_overload(
    ask: Callable[[Sequence[Message]], Awaitable[Measurement]],
    benchmark: ServeBenchmark,
    seconds: float,
) -> tuple[Phase, Returns]:
    """Offer `request_rate` of the benchmark for so long, and wait for all to end."""
    talks = conversations(benchmark)
    load = Load(talks, arrivals(benchmark, len(talks)), len(talks))
    crowd = Crowd(ask)
    await load.run(crowd.ask)
    begin_s, ended_s = load.started_s + min(RAMP_S, seconds / 4), load.started_s + seconds
    phase = phase_of(benchmark, load.measurements, begin_s, ended_s)
    return phase, crowd.returns(ended_s, phase)


async def measure(arguments: argparse.Namespace, server: Server) -> Report:
    """Wait for the server, find its peak, ask for more."""
    fields = dict(
        base_url=server.url,
        model=MODEL_NAME,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        slo_ttft=arguments.slo_ttft,
        slo_itl=arguments.slo_itl,
        ignore_eos=True,
    )
    async with httpx.AsyncClient(
        base_url=server.url, timeout=None, transport=LeanTransport(), trust_env=False
    ) as client:
        await wait_ready(client, server)
        asker = Asker(
            client=client,
            endpoint="chat",
            model=MODEL_NAME,
            output_len=arguments.output_len,
            ignore_eos=True,
            timeout_s=TIMEOUT_S,
            clock=time.perf_counter,
        )
        peaks = {}
        for at_once in arguments.at_once:
            closed = ServeBenchmark(**fields, num_prompts=10_000, seed=at_once)
            peaks[at_once] = await measure_peak(asker.ask, closed, at_once, arguments.peak_seconds)
            print(f"  {at_once:3} at once: {peaks[at_once].goodput:.2f} requests/s", flush=True)
        at_once = max(peaks, key=lambda n: peaks[n].goodput)
        if not peaks[at_once].goodput:
            raise SystemExit("nothing is answered within the objectives")
        offered = arguments.overload * peaks[at_once].goodput
        before = resident_bytes(server.pid)
        num_prompts = max(1, round(offered * arguments.seconds))
        opened = ServeBenchmark(**fields, num_prompts=num_prompts, request_rate=offered)
        overload, returns = await measure_overload(asker.ask, opened, arguments.seconds)
        after_bytes = resident_bytes(server.pid)
        # Other prompts than before: those are in the prefix cache.
        closed = ServeBenchmark(**fields, num_prompts=10_000, seed=1 + max(peaks))
        peak_after = await measure_peak(asker.ask, closed, at_once, arguments.peak_seconds)
    server.check()
    return Report(
        at_once=at_once,
        peak=peaks[at_once],
        peak_after=peak_after,
        offered=offered,
        overload=overload,
        returns=returns,
        bytes_before=before,
        bytes_after=after_bytes,
    )


async def wait_ready(client: httpx.AsyncClient, server: Server) -> None:
    """Raises SystemExit if it doesn't get so."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        server.check()
        try:
            if (await client.get("/ready", timeout=5)).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit(f"{server.name} wasn't ready within {START_TIMEOUT_S:g} s")


def to_text(report: Report) -> str:
    """The report, as it is printed."""
    over, returns = report.overload, report.returns
    statuses = Counter(over.errors)
    during = f"{returns.num_let_in_during} of {returns.num_during}"
    after = f"{returns.num_let_in_after} of {returns.num_after}"
    lines = [
        f"peak       {report.peak.goodput:.2f} requests/s, {report.at_once} at once; "
        f"{_first_token(report.peak)}",
        f"overload   {report.offered:.2f} requests/s offered for {over.seconds:.0f} s that count",
        f"peak       {report.peak_after.goodput:.2f} requests/s afterwards",
        f"goodput    {over.goodput:.2f} requests/s, {report.share_of_peak:.1%} of the peaks' mean",
        f"admitted   {over.num_answered} of {over.num_asked}; {_first_token(over)}",
        f"refused    429: {statuses.pop('HTTP 429', 0)}, 503: {statuses.pop('HTTP 503', 0)}, "
        f"otherwise: {dict(statuses) or 'none'}",
        f"came back  let in during the load {during}, where {returns.share_let_in_of_all:.0%} of "
        f"all were; after it {after}",
        f"memory     {report.bytes_before / 1e6:.0f} MB before, {report.bytes_after / 1e6:.0f} MB "
        "after",
    ]
    return "\n".join(lines)


def _first_token(phase: Phase) -> str:
    if phase.ttft_s is None:
        return "no first token"
    return f"first token after {phase.ttft_s.p50:.2f} s (p50), {phase.ttft_s.p99:.2f} s (p99)"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--overload", type=float, default=4.0)
    parser.add_argument("--peak-seconds", type=float, default=60.0)
    parser.add_argument("--at-once", type=int, nargs="+", default=[8, 16, 24])
    parser.add_argument("--seats", type=int, default=16)
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--slo-ttft", type=float, default=10.0)
    parser.add_argument("--slo-itl", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The server that is measured."""
    limits = ["--max-num-seqs", str(arguments.seats), "--max-num-queued-reqs", str(arguments.queue)]
    return bezel(arguments.model, limits)


def main() -> None:
    arguments = build_parser().parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(recipe_of(arguments), Path(folder)) as server,
    ):
        # The client takes what the server leaves of the cores, as if it were on another machine.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        report = asyncio.run(measure(arguments, server))
    print(to_text(report))
    if arguments.json is not None:
        content = asdict(report) | {"share_of_peak": report.share_of_peak}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
