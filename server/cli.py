"""The command `bezel`: argv and environment → one of its commands, each with a module of its own.

The only reader of `os.environ`. A mistake of the user ends in one line on stderr and exit
code 2, never in a traceback. What is slow to import is imported by the command that needs
it, so that `--help` answers at once.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from bezel.engine.errors import BezelError
from bezel.server.command_line import CommandParser, canonical
from bezel.server.version import VERSION

# For the engine's process, which inherits them before it loads torch, and NumPy in this one.
# Threads that wait for each other by spinning for long make a step ten times slower as soon as
# another program wants a core; oneDNN, and torch on top of it, would each keep a compiled product
# for the last 1,024 shapes of a batch: with the 270M model that was some 20 MiB more for every
# hundred requests; NumPy would start threads for products that nobody asks of it, and they spin
# while the rest is imported.
_VARIABLES_OF_LIBRARIES = {
    "GOMP_SPINCOUNT": "1000",
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "OPENBLAS_NUM_THREADS": "1",
}

# In the order of the help.
_COMMANDS = ("serve", "chat", "complete", "plan", "simulate", "bench", "doctor", "collect-env")
# Everything that these are told is on their command line.
_WITHOUT_ENVIRONMENT = frozenset({"plan", "simulate", "bench"})


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The whole command line, or of all commands only this one: what others import isn't needed.

    Flags that aren't given leave no trace in the namespace.
    """
    parser = CommandParser(prog="bezel", description="Serve Gemma models behind OpenAI's HTTP API.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in (command,) if command in _COMMANDS else _COMMANDS:
        _module(name).add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        words = canonical(sys.argv[1:] if argv is None else argv)
        arguments = build_parser(words[0] if words else None).parse_args(words)
        for name, value in _VARIABLES_OF_LIBRARIES.items():
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
    module = _module(arguments.command)
    if arguments.command in _WITHOUT_ENVIRONMENT:
        code: int = module.run(arguments)
    else:
        code = module.run(arguments, os.environ)
    return code


def _module(command: str) -> Any:
    return importlib.import_module(f"bezel.server.{command.replace('-', '_')}_command")


if __name__ == "__main__":
    sys.exit(main())
