"""The command `bezel`: argv and environment → one of its commands, each with a module of its own.

The only reader of `os.environ`. A mistake of the user ends in one line on stderr and exit
code 2, never in a traceback. What is slow to import is imported by the command that needs
it, so that `--help` answers at once.
"""

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from bezel.engine.errors import BezelError
from bezel.server import (
    bench_command,
    chat_command,
    collect_env_command,
    complete_command,
    doctor_command,
    plan_command,
    serve_command,
    simulate_command,
)
from bezel.server.command_line import CommandParser, canonical
from bezel.server.version import VERSION

# For the engine process, which inherits them before it loads torch. Threads that wait for each
# other by spinning for long make a step ten times slower as soon as another program wants a core;
# and oneDNN, and torch on top of it, would each keep a compiled product for the last 1,024 shapes
# of a batch: with the 270M model that was some 20 MiB more for every hundred requests.
_ENGINE_VARIABLES = {
    "GOMP_SPINCOUNT": "1000",
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}

# In the order of the help.
_COMMANDS: Mapping[str, Any] = MappingProxyType(
    {
        "serve": serve_command,
        "chat": chat_command,
        "complete": complete_command,
        "plan": plan_command,
        "simulate": simulate_command,
        "bench": bench_command,
        "doctor": doctor_command,
        "collect-env": collect_env_command,
    }
)
# Everything that these are told is on their command line.
_WITHOUT_ENVIRONMENT = frozenset({"plan", "simulate", "bench"})


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; flags that aren't given leave no trace in the namespace."""
    parser = CommandParser(prog="bezel", description="Serve Gemma models behind OpenAI's HTTP API.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMANDS.values():
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        arguments = build_parser().parse_args(canonical(sys.argv[1:] if argv is None else argv))
        for name, value in _ENGINE_VARIABLES.items():
            os.environ.setdefault(name, value)
        if isinstance(sys.stdout, io.TextIOWrapper):
            # What a terminal has no letter for must not end an answer.
            sys.stdout.reconfigure(errors="replace")
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BezelError as error:
        print(f"bezel: error: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells have it for Ctrl-C
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: argparse.Namespace) -> int:
    module = _COMMANDS[arguments.command]
    if arguments.command in _WITHOUT_ENVIRONMENT:
        code: int = module.run(arguments)
    else:
        code = module.run(arguments, os.environ)
    return code


if __name__ == "__main__":
    sys.exit(main())
