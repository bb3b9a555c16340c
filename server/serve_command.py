"""`bezel serve [MODEL]`: flags, variables and a config file → `ServerConfig` → `serve`."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from bezel.engine.config import EngineConfig
from bezel.server import foreign_flags
from bezel.server.config import ServerConfig
from bezel.server.options import add_flags, options_of
from bezel.server.plan_command import print_plan
from bezel.server.settings import Settings, all_options

_MODEL_HELP = "Hugging Face id, directory or .gguf file [default: the embedded Gemma 3 270M]"


def add_parser(commands: Any) -> None:
    """Add `serve` to the subparsers `commands`; flags that aren't given leave no trace."""
    parser = commands.add_parser(
        "serve",
        help="load a model and serve it",
        description="Load a model and serve it over HTTP.",
        epilog="Every setting is also a variable and a key of the config file: --max-model-len is "
        "BEZEL_MAX_MODEL_LEN, and max-model-len: 8192. A flag beats the variable, that the file.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=_MODEL_HELP
    )
    parser.add_argument(
        "--model",
        dest="model",
        metavar="MODEL",
        default=argparse.SUPPRESS,
        help="the same as a flag",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file with settings, named as their flags",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print every setting and where it is from, as such a file, and serve nothing",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what `bezel plan` says of this model, machine and settings, and serve nothing",
    )
    add_flags(parser, "server", options_of(ServerConfig))
    add_flags(parser, "engine", options_of(EngineConfig))
    own = [flag for option in all_options() for flag in (option.flag, option.flag_off)]
    foreign_flags.add_foreign_flags(parser, own)


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Serve until a signal comes, or print what was asked for; returns the exit code.

    Raises:
        BezelError: a setting can't be, or the model can't be served.
    """
    given = vars(arguments)
    settings = Settings.of(given, environ)
    for warning in (*given.get(foreign_flags.WARNINGS, ()), *settings.warnings):
        print(f"bezel: warning: {warning}", file=sys.stderr)
    config = settings.config()
    if arguments.print_config:
        print(settings.as_yaml())
        return 0
    if arguments.dry_run:
        from bezel.engine.planning.machine import plan_to_serve

        print_plan(plan_to_serve(config.engine))
        return 0
    from bezel.server.serve import serve

    serve(config)
    return 0
