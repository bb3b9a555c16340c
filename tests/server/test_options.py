"""Flags and variables as derived from a dataclass."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from bezel.engine.config import option
from bezel.engine.errors import ConfigError
from bezel.server.options import add_flags, from_environment, options_of, parse_bytes


@dataclass(frozen=True, kw_only=True)
class Settings:
    internal: int = 0
    max_len: int | None = option(None, "Length [default: all]")
    share: float = option(0.5, "Share in %")
    size: int = option(16, "Size", choices=(8, 16))
    kind: str = option("auto", "Kind", choices=("auto", "none"))
    memory: int | None = option(None, "Memory", type="bytes")
    kwargs: Mapping[str, Any] | None = option(None, "Kwargs", type="json")
    cache: bool = option(True, "Cache")
    key: tuple[str, ...] = option((), "Key")
    name: tuple[str, ...] = option((), "Name", nargs="+")


OPTIONS = options_of(Settings)


def parse(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, "settings", OPTIONS)
    return vars(parser.parse_args(argv))


def test_names() -> None:
    assert [option.name for option in OPTIONS] == [
        *("max_len", "share", "size", "kind", "memory", "kwargs", "cache", "key", "name")
    ]
    assert (OPTIONS[0].flag, OPTIONS[0].variable) == ("--max-len", "BEZEL_MAX_LEN")


def test_nothing_given_leaves_no_trace() -> None:
    assert parse() == {}
    assert from_environment(OPTIONS, {"MAX_LEN": "3", "BEZEL_OTHER": "x"}) == {}


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ("--max-len 3", {"max_len": 3}),
        ("--share=0.25", {"share": 0.25}),
        ("--size 8", {"size": 8}),
        ("--kind none", {"kind": "none"}),
        ("--memory 2G", {"memory": 2 * 2**30}),
        ('--kwargs {"a":[1]}', {"kwargs": {"a": [1]}}),
        ("--cache", {"cache": True}),
        ("--no-cache", {"cache": False}),
        ("--key a --key b", {"key": ["a", "b"]}),
        ("--name a b --name c", {"name": ["a", "b", "c"]}),
    ],
)
def test_flags(argv: str, values: dict[str, Any]) -> None:
    assert parse(*argv.split()) == values


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("MAX_LEN", "3", 3),
        ("SHARE", "0.25", 0.25),
        ("SIZE", "8", 8),
        ("KIND", "none", "none"),
        ("MEMORY", "1k", 1000),
        ("CACHE", "0", False),
        ("CACHE", "False", False),
        ("CACHE", "1", True),
        ("CACHE", "true", True),
        ("KEY", "a, b", ("a", "b")),
    ],
)
def test_variables(variable: str, text: str, value: Any) -> None:
    given = from_environment(OPTIONS, {f"BEZEL_{variable}": text})
    assert given == {variable.lower(): value}


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("MAX_LEN", "1.5", "'1.5' is not a whole number"),
        ("MAX_LEN", "", "'' is not a whole number"),
        ("SHARE", "half", "'half' is not a number"),
        ("SIZE", "9", "'9' is not one of 8, 16"),
        ("KIND", "some", "'some' is not one of auto, none"),
        ("KWARGS", "[1]", "'[1]' is not a JSON object"),
        ("KWARGS", "{", "'{' is not a JSON object"),
        ("CACHE", "yes", "'yes' is not one of 1, 0, true, false"),
        ("MEMORY", "2T", "'2T' is not a number of bytes, such as 1500000000, 1500m or 1.5G"),
    ],
)
def test_errors_name_the_variable_or_the_flag(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_environment(OPTIONS, {f"BEZEL_{variable}": text})
    assert error.value.message == f"BEZEL_{variable}: {message}"
    if variable != "CACHE":
        flag = f"--{variable.lower().replace('_', '-')}"
        with pytest.raises(argparse.ArgumentError) as flag_error:
            parse(f"{flag}={text}")
        assert str(flag_error.value) == f"argument {flag}: {message}"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1500", 1500),
        ("2k", 2000),
        ("2K", 2048),
        ("3m", 3 * 10**6),
        ("3M", 3 * 2**20),
        ("4g", 4 * 10**9),
        ("4G", 4 * 2**30),
        ("1.5G", 3 * 2**29),
    ],
)
def test_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "G", "1GB", "1 G x", "1.5.2G", "nan", "1e400", "infG"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="not a number of bytes"):
        parse_bytes(text)


def test_help_tells_defaults_once() -> None:
    helps = {option.name: option.help_with_default for option in OPTIONS}
    assert helps["max_len"] == "Length [default: all]"
    assert helps["share"] == "Share in % [default: 0.5]"
    assert helps["memory"] == "Memory"
    assert helps["key"] == "Key"


def test_help_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "Share in % [default: 0.5]" in capsys.readouterr().out
