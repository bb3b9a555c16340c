"""Arguments as argparse reads them, but for what it is too strict or too curt about.

A mistake is a `ConfigError`; an unknown flag is told with the nearest known one; names of flags may
have `_` for `-`, as vLLM's may.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from bezel.engine.errors import ConfigError
from bezel.server.foreign_flags import RENAMED, is_foreign
from bezel.server.nearest import did_you_mean

_FLAG = re.compile(r"--?[A-Za-z]")
_LONG_FLAG = re.compile(r"(--[A-Za-z][\w-]*)(\.[\w.-]+)?($|=.*)", re.DOTALL)


class CommandParser(argparse.ArgumentParser):
    """A parser whose subparsers are of this class too.

    All parsing raises ConfigError where argparse would print and exit.
    """

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        namespace, extras = super().parse_known_args(args, namespace)
        for extra in extras:
            if _FLAG.match(extra):
                raise ConfigError(self._unknown(extra.partition("=")[0]))
        return namespace, extras

    def _unknown(self, flag: str) -> str:
        visible = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = [name for action in visible for name in action.option_strings]
        if RENAMED.get(flag) in known:
            return f"{flag} is called {RENAMED[flag]} here"
        return f"unknown flag {flag}{did_you_mean(flag, known)}"


def canonical(argv: Sequence[str]) -> list[str]:
    """`--max_model_len=8` → `--max-model-len=8`; values are left alone, and all after `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [*map(_canonical, argv[:end]), *argv[end:]]


def _canonical(word: str) -> str:
    found = _LONG_FLAG.fullmatch(word)
    if found is None:
        return word
    name = found[1].replace("_", "-")
    # vLLM lets parts of a JSON value be given one by one: --limit-mm-per-prompt.image 4
    part = "" if is_foreign(name) else found[2] or ""
    return name + part + found[3]
