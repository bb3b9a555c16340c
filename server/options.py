"""Settings as command line flags and as `BEZEL_*` variables, derived from the config dataclasses.

Every field that `engine.config.option` made is both; no default is written twice, because a
flag or a variable that isn't given leaves the field to its dataclass. Precedence:
flag, then variable, then config file, then default. Reads no environment itself: it is handed a
mapping.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from bezel.engine.errors import ConfigError

_BYTE_SUFFIXES = {"k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3}
_BOOLS = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True, slots=True)
class Option:
    """One setting. `parse` turns the text of one value into it, or raises ValueError. A secret one
    is never printed."""

    name: str
    type: type
    default: Any
    help: str
    parse: Callable[[str], Any]
    choices: tuple[Any, ...] | None
    nargs: str | None
    is_secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flag_off(self) -> str:
        """That of a switch which turns it off."""
        return "--no-" + self.flag.removeprefix("--")

    @property
    def variable(self) -> str:
        return "BEZEL_" + self.name.upper()

    @property
    def help_with_default(self) -> str:
        if "[default:" in self.help or self.default in (None, ()):
            return self.help
        return f"{self.help} [default: {self.default}]"


def options_of(config_class: type) -> list[Option]:
    """The settings among the fields of a config dataclass, in their order."""
    hints = get_type_hints(config_class)
    return [
        Option(
            name=spec.name,
            type=_plain_type(hints[spec.name]),
            default=spec.default,
            help=spec.metadata["help"],
            parse=_parser(_plain_type(hints[spec.name]), spec.metadata),
            choices=spec.metadata.get("choices"),
            nargs=spec.metadata.get("nargs"),
            is_secret=spec.metadata.get("secret", False),
        )
        for spec in fields(config_class)
        if "help" in spec.metadata
    ]


def add_flags(parser: argparse.ArgumentParser, title: str, options: Iterable[Option]) -> None:
    """Give the parser a flag for every option; those not given leave no trace in the result."""
    group = parser.add_argument_group(title)
    for option in options:
        common: dict[str, Any] = {
            "dest": option.name,
            "default": argparse.SUPPRESS,
            "help": option.help_with_default.replace("%", "%%"),
        }
        if option.type is bool:
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
            continue
        metavar = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else None
        common |= {"type": _argument_type(option.parse), "metavar": metavar}
        if option.type is tuple:
            common["action"] = "extend"
            common["nargs"] = option.nargs or 1
        group.add_argument(option.flag, **common)


def from_environment(options: Iterable[Option], environ: Mapping[str, str]) -> dict[str, Any]:
    """The values of those options whose variable is set; lists are separated by commas.

    Raises:
        ConfigError: naming the variable that can't be read.
    """
    return {
        option.name: _from_variable(option, environ[option.variable])
        for option in options
        if option.variable in environ
    }


def _from_variable(option: Option, text: str) -> Any:
    try:
        if option.type is tuple:
            return tuple(option.parse(item.strip()) for item in text.split(","))
        return option.parse(text)
    except ValueError as error:
        raise ConfigError(f"{option.variable}: {error}") from None


def _plain_type(hint: Any) -> type:
    """`int | None` → int, `tuple[str, ...]` → tuple."""
    if isinstance(hint, UnionType):
        (hint,) = (member for member in get_args(hint) if member is not NoneType)
    plain: type = get_origin(hint) or hint
    return plain


def _parser(plain_type: type, metadata: Mapping[str, Any]) -> Callable[[str], Any]:
    choices = metadata.get("choices")
    convert: Callable[[str], Any]
    if metadata.get("type") == "bytes":
        convert = parse_bytes
    elif metadata.get("type") == "json":
        convert = _parse_json_object
    else:
        convert = {bool: _parse_bool, int: _parse_int, float: _parse_float}.get(plain_type, str)

    def parse(text: str) -> Any:
        value = convert(text)
        if choices is not None and value not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(map(str, choices))}")
        return value

    return parse


def _argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def parse_bytes(text: str) -> int:
    """`2G` → 2 × 1024³, `2g` → 2 × 1000³; likewise k, m, K, M; a bare number is bytes.

    Raises:
        ValueError: with a message for the user.
    """
    number, factor = text, 1
    if text[-1:] in _BYTE_SUFFIXES:
        number, factor = text[:-1], _BYTE_SUFFIXES[text[-1]]
    try:
        return int(float(number) * factor) if "." in number else int(number) * factor
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is not a number of bytes, such as 1500000000, 1500m or 1.5G"
        ) from None


def _parse_bool(text: str) -> bool:
    if text.lower() not in _BOOLS:
        raise ValueError(f"{text!r} is not one of 1, 0, true, false")
    return _BOOLS[text.lower()]


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object")
    return value


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
