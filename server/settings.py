"""Every setting of `bezel serve`, and where its value comes from.

    flag ▷ variable ▷ config file ▷ default of the dataclass

What `--print-config` prints is a config file, with the sources as comments. Keys aren't in it.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError
from bezel.server.config import ServerConfig
from bezel.server.config_file import read_config_file
from bezel.server.nearest import did_you_mean
from bezel.server.options import Option, from_environment, options_of

CONFIG_VARIABLE = "BEZEL_CONFIG"
URL_VARIABLE = "BEZEL_URL"
API_KEY_VARIABLE = "BEZEL_API_KEY"

# Not one of the fields with flags: on the command line it is an argument.
MODEL = Option("model", str, EngineConfig().model, "Model", str, None, None)

# What Kubernetes gives a pod for each Service: one called `bezel-…` looks like ours.
_KUBERNETES = re.compile(r"\w+_(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP))(_\w+)?")
_COLUMN = 40


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, and the flag, variable or file that it is from; of a default, None."""

    option: Option
    value: Any
    source: str | None

    def as_yaml(self) -> str:
        """A line of a config file."""
        name, value = self.option.name, self.value
        if self.option.is_secret and value not in (None, ()):
            line = f"# {name}: ***"
        else:
            plain = list(value) if isinstance(value, tuple) else value
            document = {name: dict(plain) if isinstance(plain, Mapping) else plain}
            flow = yaml.safe_dump(
                document, default_flow_style=True, allow_unicode=True, width=sys.maxsize
            )
            line = flow.strip().removeprefix("{").removesuffix("}")
        return f"{line:{_COLUMN}} # {self.source or 'default'}"


@dataclass(frozen=True, slots=True)
class Settings:
    """All of them, in the order of `bezel serve --help`, and warnings of what was ignored."""

    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], environ: Mapping[str, str]) -> "Settings":
        """Merge them; `arguments` has those flags only that were given.

        Raises:
            ConfigError: a variable or the config file can't be read.
        """
        options = all_options()
        path = arguments.get("config", environ.get(CONFIG_VARIABLE) or None)
        in_file, warnings = ({}, []) if path is None else read_config_file(path, options)
        in_environment = from_environment(options, environ)
        settings = []
        for option in options:
            name = option.name
            setting = Setting(option, option.default, None)
            if name in arguments:
                given = arguments[name]
                value = tuple(given) if isinstance(given, list) else given
                setting = Setting(option, value, option.flag)
            elif name in in_environment:
                setting = Setting(option, in_environment[name], option.variable)
            elif name in in_file:
                setting = Setting(option, in_file[name], str(path))
            settings.append(setting)
        return cls(tuple(settings), (*warnings, *_unknown_variables(environ, options)))

    def config(self) -> ServerConfig:
        """The checked configuration.

        Raises:
            ConfigError: a value is out of range; it says where the value is from.
        """
        given = {s.option.name: s.value for s in self.settings if s.source is not None}
        of_server = {option.name for option in options_of(ServerConfig)}
        server = {name: value for name, value in given.items() if name in of_server}
        engine = {name: value for name, value in given.items() if name not in of_server}
        try:
            return ServerConfig(engine=EngineConfig(**engine), **server)
        except ConfigError as error:
            raise ConfigError(error.message + self._origin(error.message)) from None

    def as_yaml(self) -> str:
        """A config file of them all."""
        return "\n".join(setting.as_yaml() for setting in self.settings)

    def _origin(self, message: str) -> str:
        """Where the setting that a message begins with was set, unless by its flag."""
        name = message.split(" ")[0].removeprefix("--").replace("-", "_")
        for setting in self.settings:
            option = setting.option
            if option.name == name and setting.source not in (None, option.flag):
                return f" (from {setting.source})"
        return ""


def all_options() -> list[Option]:
    """Of `bezel serve`, the model first."""
    return [MODEL, *options_of(ServerConfig), *options_of(EngineConfig)]


def parse_config(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> ServerConfig:
    """Merge flags over variables over the config file over defaults.

    Raises:
        ConfigError: a variable or the file can't be read, or a value is out of range.
    """
    return Settings.of(arguments, environ).config()


def _unknown_variables(environ: Mapping[str, str], options: Iterable[Option]) -> list[str]:
    known = {*(option.variable for option in options), CONFIG_VARIABLE, URL_VARIABLE}
    return [
        f"unknown variable {name}{did_you_mean(name, known)}"
        for name in sorted(environ)
        if name.startswith("BEZEL_") and name not in known and not _KUBERNETES.fullmatch(name)
    ]
