"""What scheduling costs in Python: `python benchmarks/scheduler.py [--json]`.

    schedule, commit   a step in which every running sequence decodes one token
    build              `Batch.build` of the same step, on the CPU
    waiting            for a *seat*: as many run as may; or for *pages*: what runs holds them all,
                       and of the text that waits nothing is in the cache, or the most of it
    admission          the step in which one sequence starts: a new prompt, or a hit, and no other
                       running

The real scheduler and page pool with the pages of Gemma 4 31B in bfloat16, no model. Sequences have
different lengths, so that their pages and blocks end in different steps, and a run is as many steps
as a global page has tokens: every sequence takes part once in everything that comes with a page.
Microseconds a step, the median of the runs; *worst* is the longest step of all. The growth law is a
least-squares line through the medians without anybody waiting. Other programs on the machine make
every figure larger.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from bezel.engine.batch import Batch
from bezel.engine.config import EngineConfig
from bezel.engine.kv_layout import KVLayout
from bezel.engine.messages import FinishReason
from bezel.engine.model_config import ModelConfig
from bezel.engine.page_pool import PagePool
from bezel.engine.page_tables import PageTables
from bezel.engine.planning.published import PUBLISHED
from bezel.engine.sampling_params import SamplingParams
from bezel.engine.scheduler import ScheduledStep, Scheduler
from bezel.engine.sequence import Sequence

CPU = torch.device("cpu")
RUNNING = [1, 8, 64, 256]
WAITING = [0, 100, 10_000]
PROMPTS = [2048, 8192, 32_768]
NUM_RUNS = 7
# Tokens: of the first running sequence, of the second, and how many each has more than the one
# before, so that pages end in different steps.
FIRST, SECOND, STRIDE = 16_384, 2000, 37
WAITING_TOKENS = 131_072
SEAT, PAGES, PAGES_HIT = "a seat", "pages", "pages, with a hit"
VOCAB_SIZE = 262_144


@dataclass
class Times:
    """Microseconds of each step, one list for each part."""

    schedule: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    build: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """Microseconds a step."""

    num_running: int
    num_waiting: int
    waiting_for: str
    schedule_us: float
    commit_us: float
    build_us: float
    worst_us: float  # of schedule and commit together

    @property
    def step_us(self) -> float:
        return self.schedule_us + self.commit_us


def layout_31b() -> KVLayout:
    return KVLayout.for_model(ModelConfig.from_hf(PUBLISHED["gemma-4-31B"]), 2, 16)


class Bench:
    """A scheduler, and the sequences that it is given."""

    def __init__(self, max_num_seqs: int, num_sectors: int) -> None:
        layout = layout_31b()
        config = EngineConfig(max_num_seqs=max_num_seqs)
        self.scheduler = Scheduler(config, PagePool(layout, num_sectors * layout.sector_bytes))
        self._rng = np.random.default_rng(0)
        self._names = (f"s{i}" for i in itertools.count())

    def text(self, num_tokens: int) -> list[int]:
        token_ids: list[int] = self._rng.integers(10, VOCAB_SIZE, num_tokens).tolist()
        return token_ids

    def add(self, token_ids: list[int], priority: int = 0) -> Sequence:
        sequence = Sequence(
            request_id=next(self._names),
            token_ids=token_ids,
            params=SamplingParams(max_tokens=1 << 20, priority=priority),
            seed=0,
            stop_token_ids=frozenset(),
            pages=PageTables(self.scheduler.pool.layout),
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self, times: Times, is_built: bool = False) -> ScheduledStep:
        started = time.perf_counter_ns()
        step = self.scheduler.schedule()
        scheduled = time.perf_counter_ns()
        if is_built:
            Batch.build(step, self.scheduler.pool.layout, CPU)
        built = time.perf_counter_ns()
        draws = self._rng.integers(10, VOCAB_SIZE, len(step.sampled)).tolist()
        committing = time.perf_counter_ns()
        self.scheduler.commit(step, draws)
        committed = time.perf_counter_ns()
        times.schedule.append((scheduled - started) / 1e3)
        times.build.append((built - scheduled) / 1e3)
        times.commit.append((committed - committing) / 1e3)
        return step

    def fill(self, texts: list[list[int]]) -> None:
        """Run sequences past their prompts."""
        for text in texts:
            self.add(text, priority=-1)
        while self.scheduler.waiting or any(s.is_prefilling for s in self.scheduler.running):
            self.step(Times())


def decoding_bench(num_running: int, waiting_for: str) -> tuple[Bench, list[int]]:
    """Sequences that decode, and the text of all that will wait."""
    layout = layout_31b()
    lengths = [FIRST, *(SECOND + i * STRIDE for i in range(num_running - 1))]
    grown = (NUM_RUNS + 1) * layout.global_page_size + sum(lengths) // 1000
    pages = [layout.peak_pages(num_tokens + grown) for num_tokens in lengths]
    num_sectors = sum(map(layout.num_sectors, pages))
    if waiting_for == SEAT:
        bench = Bench(num_running, 2 * num_sectors)
    else:
        bench = Bench(num_running + 1, num_sectors)
    texts = [bench.text(num_tokens) for num_tokens in lengths]
    waiting_text = bench.text(WAITING_TOKENS)
    if waiting_for == PAGES_HIT:
        waiting_text[:FIRST] = texts[0]
    bench.fill(texts)
    return bench, waiting_text


def decode_row(num_running: int, num_waiting: int, waiting_for: str = SEAT) -> Row:
    bench, waiting_text = decoding_bench(num_running, waiting_for)
    for _ in range(num_waiting):
        bench.add(waiting_text)
    run = bench.scheduler.pool.layout.global_page_size
    for _ in range(run):
        bench.step(Times())
    runs = [Times() for _ in range(NUM_RUNS)]
    for times in runs:
        for _ in range(run):
            step = bench.step(times, is_built=True)
            assert step.num_tokens == len(step.sequences) == num_running
    assert len(bench.scheduler.waiting) == num_waiting

    def median(part: str) -> float:
        return statistics.median(statistics.mean(getattr(times, part)) for times in runs)

    steps = [map(sum, zip(times.schedule, times.commit, strict=True)) for times in runs]
    worst = max(itertools.chain.from_iterable(steps))
    parts = (median("schedule"), median("commit"), median("build"))
    return Row(num_running, num_waiting, waiting_for, *parts, worst)


@dataclass(frozen=True)
class Admission:
    """Microseconds of the step in which a sequence starts."""

    num_prompt_tokens: int
    is_hit: bool
    schedule_us: float
    commit_us: float


def admissions(num_tokens: int) -> Iterator[Admission]:
    """Of a prompt that is new, and of one of which all but the last page is in the cache."""
    layout = layout_31b()
    bench = Bench(8, 8 * NUM_RUNS * layout.num_sectors(layout.peak_pages(num_tokens)))
    for is_hit in (False, True):
        times = Times()
        text = bench.text(num_tokens)
        for _ in range(NUM_RUNS + is_hit):
            text = text if is_hit else bench.text(num_tokens)
            sequence = bench.add([*text, 5])
            bench.step(times)
            while sequence.num_output_tokens == 0:
                bench.step(Times())
            bench.scheduler.finish(sequence.request_id, FinishReason.STOP)
        assert is_hit == (sequence.num_cached_tokens > 0)
        parts = (times.schedule[is_hit:], times.commit[is_hit:])  # the first time it is none
        yield Admission(num_tokens, is_hit, *map(statistics.median, parts))


def growth_law(rows: list[Row]) -> tuple[float, float]:
    """Microseconds of schedule and commit: of a step, and of each sequence in it."""
    rows = [row for row in rows if row.num_waiting == 0]
    slope, base = np.polyfit([row.num_running for row in rows], [row.step_us for row in rows], 1)
    return float(base), float(slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    rows = [decode_row(running, waiting) for running in RUNNING for waiting in WAITING]
    rows += [decode_row(64, n, kind) for kind in (PAGES, PAGES_HIT) for n in WAITING[1:]]
    starts = [row for num_tokens in PROMPTS for row in admissions(num_tokens)]
    base, slope = growth_law(rows)
    if as_json:
        law = {"step_us": base, "sequence_us": slope}
        print(json.dumps({"decode": [*map(asdict, rows)], "admission": [*map(asdict, starts)],
                          "growth_law": law}, indent=1))  # fmt: skip
        return
    print("| Running | Waiting | for | schedule, µs | commit, µs | both | worst | build, µs |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        times = (row.schedule_us, row.commit_us, row.step_us, row.worst_us, row.build_us)
        waiting_for = row.waiting_for if row.num_waiting else ""
        cells = [
            row.num_running,
            f"{row.num_waiting:,}",
            waiting_for,
            *(f"{t:,.0f}" for t in times),
        ]
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"\nschedule and commit: {base:.0f} µs a step and {slope:.2f} µs a sequence\n")
    print("| Prompt, tokens | | schedule, µs | commit, µs |")
    print("| ---: | --- | ---: | ---: |")
    for start in starts:
        kind = "hit" if start.is_hit else "new"
        times = f"{start.schedule_us:,.0f} | {start.commit_us:,.0f}"
        print(f"| {start.num_prompt_tokens:,} | {kind} | {times} |")


if __name__ == "__main__":
    main()
