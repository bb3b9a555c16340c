"""`bezel bench`: load for any server with OpenAI's API, or for an engine in this process."""

import argparse
import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.server.benchmarking.offline import (
    LatencyBenchmark,
    OfflineBenchmark,
    ThroughputBenchmark,
)
from bezel.server.benchmarking.settings import ServeBenchmark
from bezel.server.options import add_flags, options_of

_OFFLINE: Mapping[str, type[OfflineBenchmark]] = MappingProxyType(
    {"latency": LatencyBenchmark, "throughput": ThroughputBenchmark}
)
_INTERRUPTED = 130  # as shells have it for Ctrl-C


def add_parser(commands: Any) -> None:
    """Add `bench` to the subparsers `commands`, with a parser for each kind of benchmark."""
    bench = commands.add_parser(
        "bench",
        help="measure a server under load, or the engine alone",
        description="Measure how fast answers come.",
        allow_abbrev=False,
    )
    kinds = bench.add_subparsers(dest="kind", metavar="KIND", required=True)
    serve = kinds.add_parser(
        "serve",
        help="ask any server with OpenAI's API",
        description="Ask any server with OpenAI's API many things at once, read its answers as "
        "streams and time them. Ctrl-C ends it with what has been measured so far.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(serve, "benchmark", options_of(ServeBenchmark))
    _add_json_flag(serve)
    for kind, benchmark in _OFFLINE.items():
        _add_offline_parser(kinds, kind, benchmark)


def _add_offline_parser(kinds: Any, kind: str, benchmark: type[OfflineBenchmark]) -> None:
    parser = kinds.add_parser(
        kind,
        help=f"{kind} of the engine alone",
        description=f"Load a model in this process and measure its {kind}, without HTTP.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face id, directory or .gguf file [default: the embedded Gemma 3 270M]",
    )
    add_flags(parser, "benchmark", options_of(benchmark))
    _add_json_flag(parser)
    add_flags(parser, "engine", options_of(EngineConfig))


def _add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all numbers there, - for stdout")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the report, write what was asked for; returns the exit code, which is 1 when
    nothing was answered.

    Raises:
        ConfigError: an argument can't be used, or the server can't be asked at all.
    """
    given = vars(arguments)
    json_to = given.get("json")
    if json_to is not None and not Path(json_to).parent.is_dir():
        raise ConfigError(f"--json: there is no folder {Path(json_to).parent}")
    kind = given["kind"]
    if kind == "serve":
        return _bench_serve(ServeBenchmark(**_given(ServeBenchmark, given)), json_to)
    benchmark = _OFFLINE[kind](**_given(_OFFLINE[kind], given))
    config = EngineConfig(**_given(EngineConfig, given, "model"))
    return _bench_offline(benchmark, config, json_to)


def _given(config_class: type, given: dict[str, Any], *more: str) -> dict[str, Any]:
    names = [*more, *(option.name for option in options_of(config_class))]
    return {name: given[name] for name in names if name in given}


def _bench_offline(benchmark: OfflineBenchmark, config: EngineConfig, json_to: str | None) -> int:
    from tqdm import tqdm

    from bezel.engine.core import Engine
    from bezel.server.benchmarking.offline import run_offline, to_json, to_text

    engine = Engine(config)
    total = benchmark.num_iters + 1
    with tqdm(total=total, desc="Running", unit="iteration", disable=None) as bar:
        content = to_json(engine, benchmark, run_offline(engine, benchmark, bar.update))
    _print_and_write(to_text(content), content, json_to)
    return 0


def _bench_serve(benchmark: ServeBenchmark, json_to: str | None) -> int:
    from tqdm import tqdm

    from bezel.server.benchmarking.load import ServeRun
    from bezel.server.benchmarking.report import to_json, to_text
    from bezel.server.benchmarking.results import results_of

    is_interrupted = False
    with tqdm(total=benchmark.num_prompts, desc="Asking", unit="request", disable=None) as bar:
        serve_run = ServeRun(benchmark, bar.update)
        try:
            asyncio.run(serve_run.run())
        except KeyboardInterrupt:
            is_interrupted = True
    load = serve_run.load
    results = results_of(benchmark, load.measurements, load.num_skipped, load.started_s)
    _print_and_write(to_text(serve_run, results), to_json(serve_run, results), json_to)
    if is_interrupted:
        return _INTERRUPTED
    return 0 if results.num_answered else 1


def _print_and_write(text: str, content: dict[str, Any], json_to: str | None) -> None:
    as_json = json.dumps(content, indent=1)
    print(as_json if json_to == "-" else text)
    if json_to not in (None, "-"):
        path = Path(str(json_to))
        try:
            path.write_text(as_json + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
