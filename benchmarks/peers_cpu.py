"""Bezel beside llama.cpp or vLLM on a CPU, by paired ratios: `python benchmarks/peers_cpu.py PEER`.

    llama=PATH    llama.cpp's `llama-server` on the GGUF file of the default model; Bezel the same
    vllm=PATH     a Python that has vLLM's CPU build, on the same weights in bfloat16, which are
                  written to --folder first; Bezel the same folder

--peer-command "… {port} …" starts anything else with OpenAI's API, which has to call its model `m`;
--model is what Bezel serves beside it. See `peers/cells.py` for what is asked and `peers/pairs.py`
for the order. Ctrl-C or SIGTERM stop all servers and print what is there.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import ratios, servers
from peers.cells import CELLS
from peers.pairs import Plan, Run

from bezel.engine.checkpoint import resolve_checkpoint
from bezel.engine.tokenizer import Tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peer", nargs="?", metavar="PEER", help="llama=PATH or vllm=PATH")
    parser.add_argument("--peer-command", help="command line with {port} in it, instead of PEER")
    parser.add_argument("--peer-variable", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--model", default="default", help="what Bezel serves")
    parser.add_argument("--bezel-arguments", default="", help="further flags of `bezel serve`")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--starts", type=int, help="pairs that start both servers [default: all]")
    parser.add_argument("--cells", default="", help="only those whose names contain this")
    parser.add_argument("--limit", type=float, default=720, help="seconds; then no pair begins")
    parser.add_argument("--timeout", type=float, default=180, help="seconds of one request")
    parser.add_argument("--start-timeout", type=float, default=300, help="seconds of one start")
    parser.add_argument("--folder", type=Path, help="logs and exported weights [default: new]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    arguments = parser.parse_args()
    if (arguments.peer is None) == (arguments.peer_command is None):
        parser.error("name PEER or --peer-command")
    return arguments


def recipes(arguments: argparse.Namespace, folder: Path) -> tuple[servers.Recipe, servers.Recipe]:
    """Bezel's and the peer's."""
    further = arguments.bezel_arguments.split()
    if arguments.peer_command:
        other = servers.any_other(arguments.peer_command, arguments.peer_variable)
        return servers.bezel(arguments.model, further), other
    kind, _, path = arguments.peer.partition("=")
    if kind == "llama":
        model = arguments.model
        gguf = str(resolve_checkpoint(model).path)
        return servers.bezel(model, further), servers.llama(path, gguf)
    if kind != "vllm":
        raise SystemExit(f"{arguments.peer}: llama=PATH and vllm=PATH are known")
    model = arguments.model
    if model == "default":
        from peers.export import export_default_model  # with torch, which nothing else here needs

        model = str(folder / "gemma-3-270m-bf16")
        export_default_model(Path(model))
    return servers.bezel(model, further), servers.vllm(path, model)


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="bezel-peers-"))
    folder.mkdir(parents=True, exist_ok=True)
    both = recipes(arguments, folder)
    checkpoint = resolve_checkpoint(both[0].command[2])
    servers.read_ahead(checkpoint.path)
    tokenizer = Tokenizer.load(checkpoint)
    plan = Plan(
        recipes=both,
        folder=folder,
        num_pairs=arguments.pairs,
        num_starts=max(1, arguments.pairs if arguments.starts is None else arguments.starts),
        limit_s=arguments.limit,
        request_timeout_s=arguments.timeout,
        start_timeout_s=arguments.start_timeout,
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        cells=[cell for cell in CELLS if arguments.cells in cell.name],
    )
    run = Run(plan, lambda line: print(line, file=sys.stderr, flush=True))
    try:
        run.run()
    except KeyboardInterrupt:
        pass
    finally:
        report(run, arguments.json)


def report(run: Run, path: Path | None) -> None:
    """The table, and everything behind it as JSON."""
    bezel, peer = (recipe.name for recipe in run.plan.recipes)
    rows = ratios.rows(run.values, bezel, peer)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}\n")
    print(ratios.table(rows, bezel, peer))
    if path is not None:
        path.write_text(json.dumps(as_json(run, rows), indent=1), encoding="utf-8")


def as_json(run: Run, rows: list[ratios.Row]) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commands": {r.name: [*r.command] for r in run.plan.recipes},
        "variables": {r.name: r.variables for r in run.plan.recipes},
        "rows": [asdict(row) for row in rows],
        "values": [asdict(value) for value in run.values],
        "cells": [asdict(result) for result in run.results],
    }


if __name__ == "__main__":
    main()
