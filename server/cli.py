"""The command `bezel`: argv and environment → `ServerConfig` → `serve`. The other commands have
modules of their own.

The only reader of `os.environ`. A mistake of the user ends in one line on stderr and exit
code 2, never in a traceback. What is slow to import is imported by the command that needs
it, so that `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from bezel.engine.config import EngineConfig
from bezel.engine.errors import BezelError, ConfigError
from bezel.server import bench_command, plan_command, simulate_command
from bezel.server.config import ServerConfig
from bezel.server.options import add_flags, from_environment, options_of
from bezel.server.version import VERSION

_MODEL_VARIABLE = "BEZEL_MODEL"

# For the engine process, which inherits them before it loads torch. Threads that wait for each
# other by spinning for long make a step ten times slower as soon as another program wants a core;
# and oneDNN, and torch on top of it, would each keep a compiled product for the last 1,024 shapes
# of a batch: with the 270M model that was some 20 MiB more for every hundred requests.
_ENGINE_VARIABLES = {
    "GOMP_SPINCOUNT": "1000",
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}

_COMMANDS = {"plan": plan_command, "simulate": simulate_command, "bench": bench_command}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; flags that aren't given leave no trace in the namespace."""
    parser = _Parser(prog="bezel", description="Serve Gemma models behind OpenAI's HTTP API.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_serve_parser(commands)
    for module in _COMMANDS.values():
        module.add_parser(commands)
    return parser


def _add_serve_parser(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="load a model and serve it",
        description="Load a model and serve it over HTTP.",
        epilog="Every flag is also a variable: --max-model-len is BEZEL_MAX_MODEL_LEN.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=argparse.SUPPRESS,
        help="Hugging Face id, directory or .gguf file [default: the embedded Gemma 3 270M]",
    )
    serve.add_argument(
        "--dry-run",
        action="store_true",
        help="print what `bezel plan` says of this model, machine and settings, and serve nothing",
    )
    add_flags(serve, "server", options_of(ServerConfig))
    add_flags(serve, "engine", options_of(EngineConfig))


def parse_config(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> ServerConfig:
    """Merge flags over variables over defaults.

    Raises:
        ConfigError: a variable can't be read, or a value is out of range.
    """
    server = from_environment(options_of(ServerConfig), environ)
    engine = from_environment(options_of(EngineConfig), environ)
    if _MODEL_VARIABLE in environ:
        engine["model"] = environ[_MODEL_VARIABLE]
    server |= _given(arguments, [option.name for option in options_of(ServerConfig)])
    engine |= _given(arguments, ["model", *(option.name for option in options_of(EngineConfig))])
    return ServerConfig(engine=EngineConfig(**engine), **server)


def _given(arguments: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    given = {name: arguments[name] for name in names if name in arguments}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        for name, value in _ENGINE_VARIABLES.items():
            os.environ.setdefault(name, value)
        if arguments.command in _COMMANDS:
            code: int = _COMMANDS[arguments.command].run(arguments)
            return code
        return _serve(arguments)
    except BezelError as error:
        print(f"bezel: error: {error.message}", file=sys.stderr)
        return 2


def _serve(arguments: argparse.Namespace) -> int:
    config = parse_config(vars(arguments), os.environ)
    if arguments.dry_run:
        from bezel.engine.planning.machine import plan_to_serve

        plan_command.print_plan(plan_to_serve(config.engine))
        return 0
    from bezel.server.serve import serve

    serve(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
