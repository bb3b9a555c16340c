"""`bezel simulate`: a trace through the scheduler under a computed clock. Arguments in, report out.

What imports torch is imported when it is needed.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.engine.planning.device import PRESETS, Device
from bezel.engine.simulation.generators import WORKLOADS, Workload, generate
from bezel.engine.simulation.trace import TraceRequest, read_trace, write_trace
from bezel.server.options import Option, add_flags, options_of, parse_bytes

if TYPE_CHECKING:
    from bezel.engine.simulation.recorder import Recorder
    from bezel.engine.simulation.setup import Setup


def add_parser(commands: Any) -> None:
    """Add the command to those of the parser; flags that aren't given leave no trace."""
    parser = commands.add_parser(
        "simulate",
        help="estimate how a device would serve a trace, running nothing",
        description="Run a trace, or an invented one, through the engine's own scheduler and "
        "page pool under a clock computed from the device's data sheet. All times are estimated.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("trace", metavar="TRACE", nargs="?", help="a JSONL file")
    parser.add_argument("--model", help="published Gemma or checkpoint [default: gemma-4-31B]")
    parser.add_argument("--max-requests", type=int, help="stop reading the trace after so many")
    parser.add_argument(
        "--slo-ttft", type=float, metavar="SECONDS", help="goodput: wanted time to first token"
    )
    parser.add_argument(
        "--slo-itl", type=float, metavar="SECONDS", help="goodput: wanted mean time between tokens"
    )
    parser.add_argument("--json", metavar="FILE", help="write all results there, - for stdout")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw them")
    device = parser.add_argument_group("device")
    device.add_argument(
        "--device", dest="preset", choices=tuple(PRESETS), help="its data sheet [default: h100]"
    )
    device.add_argument(
        "--device-memory", type=_bytes, metavar="BYTES", help="memory in place of the data sheet's"
    )
    generator = parser.add_argument_group("instead of a trace")
    generator.add_argument("--generate", choices=tuple(WORKLOADS), help="invent one of this kind")
    generator.add_argument("--write-trace", type=Path, metavar="FILE", help="keep it")
    add_flags(parser, "what is invented", options_of(Workload))
    add_flags(parser, "engine", _engine_options())


def run(arguments: argparse.Namespace) -> int:
    """Simulate, print the report, write what was asked for; returns the exit code.

    Raises:
        ConfigError: an argument, the trace or the model can't be used.
    """
    from bezel.engine.simulation.plot import plot, require_matplotlib
    from bezel.engine.simulation.report import to_json, to_text
    from bezel.engine.simulation.results import results_of
    from bezel.engine.simulation.setup import Setup

    given = vars(arguments)
    _check(given)
    if "plot" in given:
        require_matplotlib()
    setup = Setup.of(_engine_config(given), _device(given))
    recorder = _simulate(setup, given)
    results = results_of(recorder, given.get("slo_ttft"), given.get("slo_itl"))
    if given.get("json") == "-":
        print(json.dumps(to_json(setup, results), indent=1))
    else:
        print(to_text(setup, results))
    if given.get("json", "-") != "-":
        _write(Path(given["json"]), json.dumps(to_json(setup, results), indent=1) + "\n")
    if "plot" in given:
        plot(given["plot"], setup, results, recorder.requests)
    return 0


def _check(given: dict[str, Any]) -> None:
    if ("trace" in given) == ("generate" in given):
        raise ConfigError("simulate needs either a TRACE or --generate")
    inventing = ("write_trace", *(option.name for option in options_of(Workload)))
    for name in inventing:
        if name in given and "generate" not in given:
            raise ConfigError(f"--{name.replace('_', '-')} goes with --generate only")
    if given.get("max_requests", 1) < 1:
        raise ConfigError(f"--max-requests must be at least 1, got {given['max_requests']}")
    # Known now, and not when all has been computed.
    for name in ("json", "plot", "write_trace"):
        folder = Path(given.get(name, "-")).parent
        if not folder.is_dir():
            raise ConfigError(f"--{name.replace('_', '-')}: there is no folder {folder}")


def _simulate(setup: "Setup", given: dict[str, Any]) -> "Recorder":
    from tqdm import tqdm

    from bezel.engine.planning.step_cost import StepCost
    from bezel.engine.simulation.simulator import Simulator

    requests, total = _requests(given)
    simulator = Simulator(
        setup.config,
        setup.model.layout,
        setup.arena_bytes,
        setup.max_model_len,
        StepCost(setup.model, setup.device),
        requests,
    )
    with tqdm(total=total, desc="Simulating", unit="request", disable=None) as bar:
        return simulator.run(bar.update)


def _requests(given: dict[str, Any]) -> tuple[Iterator[TraceRequest], int | None]:
    """Those of the trace, or invented ones; and how many, if that is known."""
    most = given.get("max_requests")
    if "trace" in given:
        return islice(read_trace(Path(given["trace"])), most), most
    wanted = {o.name: given[o.name] for o in options_of(Workload) if o.name in given}
    workload = replace(WORKLOADS[given["generate"]], **wanted)
    requests = islice(generate(workload), most)
    total = min(workload.num_requests, most or workload.num_requests)
    if "write_trace" in given:
        return write_trace(given["write_trace"], requests), total
    return requests, total


def _engine_config(given: dict[str, Any]) -> EngineConfig:
    flags = {o.name: given[o.name] for o in _engine_options() if o.name in given}
    return EngineConfig(model=given.get("model", "gemma-4-31B"), **flags)


def _engine_options() -> list[Option]:
    """The engine's settings, without those that make no difference: the device is another, and
    nothing is launched or drawn."""
    unused = ("device", "enforce_eager", "seed")
    return [option for option in options_of(EngineConfig) if option.name not in unused]


def _device(given: dict[str, Any]) -> Device:
    device = PRESETS[given.get("preset", "h100")]
    return replace(device, memory_bytes=given.get("device_memory", device.memory_bytes))


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
