"""How a step's time grows: `python benchmarks/cost_growth.py`.

    context   16 to 8,192 tokens before the one that is computed, one sequence; the attention layers
              of each kind by themselves, with the projection of what they find: local ones see
              the last 512 tokens
    batch     1 to 64 sequences
    waiting   0 to 1,000 requests that wait while 8 run

A point's value is the median of the rounds', a round's the median of its steps; every round takes
all points, one after the other. Writes the numbers to --output and draws --plot, which needs
`pip install bezel-serve[plot]`; --from FILE draws numbers that are there already.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = (16, 64, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
WAITING = (0, 10, 100, 1000)
SHORT_CONTEXT, SEATS = 64, 8
WARM_UP_STEPS, NUM_STEPS, NUM_LAYER_STEPS = 3, 16, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Milliseconds of a step. `growth` is what `amount` counts; `local_ms` and `global_ms` are of
    all layers of a kind."""

    growth: str
    amount: int
    step_ms: float
    local_ms: float | None = None
    global_ms: float | None = None


def median_of(rounds: Sequence[Point]) -> Point:
    """Of one point's rounds, each number by itself."""
    first = rounds[0]

    def median(name: str) -> float | None:
        values = [getattr(point, name) for point in rounds]
        return None if None in values else statistics.median(values)

    step_ms = median("step_ms")
    assert step_ms is not None
    return Point(
        growth=first.growth,
        amount=first.amount,
        step_ms=step_ms,
        local_ms=median("local_ms"),
        global_ms=median("global_ms"),
    )


def one_round(batch: Any, seats: Any) -> Iterator[Point]:
    """All points, of an engine with many seats and of one with SEATS."""
    for context in CONTEXTS:
        batch.fill(1, context)
        step_ms = _step_ms(batch)
        local_ms, global_ms = _attention_ms(batch)
        batch.empty()
        yield Point(
            growth="context",
            amount=context,
            step_ms=step_ms,
            local_ms=local_ms,
            global_ms=global_ms,
        )
    for num_running in BATCHES:
        batch.fill(num_running, SHORT_CONTEXT)
        yield Point(growth="batch", amount=num_running, step_ms=_step_ms(batch))
        batch.empty()
    for num_waiting in WAITING:
        seats.fill(SEATS, SHORT_CONTEXT, num_waiting)
        yield Point(growth="waiting", amount=num_waiting, step_ms=_step_ms(seats))
        seats.empty()


def _step_ms(batch: Any) -> float:
    batch.steps_s(WARM_UP_STEPS)
    return 1e3 * statistics.median(batch.steps_s(NUM_STEPS))


def _attention_ms(batch: Any) -> tuple[float, float]:
    """Milliseconds a step that attention of local layers takes, and of global ones, in steps that
    aren't recorded: in others no layer is called."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    started = 0.0

    def begin(module: Any, inputs: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def end(module: Any, inputs: Any, output: Any) -> None:
        seconds[module.layer.is_local][-1] += time.perf_counter() - started

    runner = batch.engine.runner
    programs, runner.decode_programs = runner.decode_programs, None
    modules = [layer.self_attn for layer in batch.engine.runner.model.layers]
    hooks = [module.register_forward_pre_hook(begin) for module in modules]
    hooks += [module.register_forward_hook(end) for module in modules]
    try:
        for _ in range(NUM_LAYER_STEPS):
            for of_kind in seconds.values():
                of_kind.append(0.0)
            batch.step_s()
    finally:
        runner.decode_programs = programs
        for hook in hooks:
            hook.remove()
    return 1e3 * statistics.median(seconds[True]), 1e3 * statistics.median(seconds[False])


def measure(format: str, model: str, num_rounds: int) -> list[Point]:
    from decoding import Decoding, build_engine

    batch = Decoding(build_engine(format, model))
    seats = Decoding(build_engine(format, model, max_num_seqs=SEATS))
    rounds = [list(one_round(batch, seats)) for _ in range(num_rounds)]
    return [median_of(of_point) for of_point in zip(*rounds, strict=True)]


def draw(points: Sequence[Point], window: int, path: Path) -> None:
    """Three diagrams side by side, as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 3.6), layout="constrained")
    FigureCanvasSVG(figure)  # which draws it, without a display
    context, batch, waiting = figure.subplots(1, 3)
    lines = {"step_ms": "step", "local_ms": "local layers", "global_ms": "global layers"}
    _line(context, points, "context", lines, "tokens of context, one sequence")
    context.axvline(window, color="black", linestyle=":", linewidth=1, label="window")
    context.set_xscale("log", base=2)
    _line(batch, points, "batch", {"step_ms": "step"}, "sequences at once")
    _line(waiting, points, "waiting", {"step_ms": "step"}, "requests waiting, 8 running")
    waiting.set_xscale("symlog", linthresh=10)
    for axes in (context, batch, waiting):
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "bezel"}):  # equal numbers make an equal file
        figure.savefig(path, format="svg", metadata={"Date": None})


def _line(
    axes: Any, points: Sequence[Point], growth: str, names: dict[str, str], title: str
) -> None:
    own = [point for point in points if point.growth == growth]
    for name, label in names.items():
        values = [getattr(point, name) for point in own]
        if None not in values:
            axes.plot([p.amount for p in own], values, marker="o", markersize=3, label=label)
    axes.set_xlabel(title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", default="default", help="of the weights: see decoding.py")
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=int, default=512, help="of the model's local layers")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="draw only")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "cost_growth.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "cost_growth.svg")
    arguments = parser.parse_args()
    if arguments.source is not None:
        points = [Point(**one) for one in json.loads(arguments.source.read_text())["points"]]
    else:
        points = measure(arguments.format, arguments.model, arguments.rounds)
        content = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "model": arguments.model,
            "format": arguments.format,
            "points": [asdict(point) for point in points],
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for point in points:
        kinds = ""
        if point.local_ms is not None:
            kinds = f"   local layers {point.local_ms:7.3f}   global layers {point.global_ms:7.3f}"
        print(f"{point.growth:8} {point.amount:5}   step {point.step_ms:8.3f} ms{kinds}")
    draw(points, arguments.window, arguments.plot)


if __name__ == "__main__":
    main()
