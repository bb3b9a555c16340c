"""`bezel collect-env`: what a report of a bug should say of the machine, fit to be shown to others.

Names of hosts and users, home directories, keys and addresses are left out.
"""

import argparse
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bezel.server.settings import all_options
from bezel.server.version import VERSION

_HIDDEN = "***"
# Parts of names of settings whose values tell who or where somebody is.
_PRIVATE = ("host", "url", "origin", "endpoint", "key")
_NAME_WIDTH = 18


def add_parser(commands: Any) -> None:
    """Add `collect-env` to the subparsers `commands`."""
    parser = commands.add_parser(
        "collect-env",
        help="print what a bug report should say of this machine",
        description="Print versions, system, CPU, memory, GPUs and settings for a bug report, "
        "without names of hosts or users, home directories, keys and addresses.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print it."""
    facts = _without_home(collect(environ))
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        lines = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else value
        for line in [lines] if isinstance(lines, str) else lines or ["none"]:
            print(f"{name:{_NAME_WIDTH}} {line}")
            name = ""
    return 0


def collect(environ: Mapping[str, str]) -> dict[str, Any]:
    """A text, a list of them, or a mapping to them for each name."""
    from bezel.engine.diagnostics import facts

    info = facts.read_cpuinfo()
    commit = facts.commit()
    found: dict[str, Any] = {
        "bezel": VERSION if commit is None else f"{VERSION}, commit {commit}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": facts.operating_system(),
        "cpu": f"{facts.cpu_name(info)}, {facts.cores()}",
        "cpu features": " ".join(facts.cpu_features(info)) or "none",
    }
    try:
        available, total = facts.memory_bytes()
        found["memory"] = f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
        found["gpus"] = facts.gpus()
    except (ImportError, OSError) as error:
        found["torch"] = f"can't be imported: {error}"
    found["gpu driver"] = facts.gpu_driver() or "none"
    return {**found, "packages": facts.versions(), "variables": shown_variables(environ)}


def shown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Ours; of those that aren't settings, or may be private, only that they are set."""
    shown = {option.variable for option in all_options() if not option.is_secret}
    return {
        name: value if name in shown and not _is_private(name) else _HIDDEN
        for name, value in sorted(environ.items())
        if name.startswith("BEZEL_")
    }


def _is_private(variable: str) -> bool:
    return any(part in variable.lower() for part in _PRIVATE)


def _without_home(value: Any) -> Any:
    """The same with `~` for the home directory, and for the user in other paths."""
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    try:
        home = Path.home()
    except RuntimeError:
        return value
    if home.parent == home:
        return value
    text = str(value).replace(str(home), "~")
    return re.sub(rf"(?<=/){re.escape(home.name)}(?=/|$)", "~", text)
