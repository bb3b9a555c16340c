"""Settings in a YAML file: the names of flags with `-` or `_`, and YAML's own values.

    model: google/gemma-4-E2B-it
    max-model-len: 8192
    kv_cache_memory_bytes: 2G
    served-model-name: [gemma, default]
    default-chat-template-kwargs: {enable_thinking: true}

Values go through the same parsers as those of flags, so a file can't say what a flag couldn't.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from bezel.engine.errors import ConfigError
from bezel.server.foreign_flags import foreign_setting
from bezel.server.nearest import did_you_mean
from bezel.server.options import Option


def read_config_file(path: str, options: Iterable[Option]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a file, and warnings of those that do nothing. A null is not given.

    Raises:
        ConfigError: naming the file, and the key if it is one key's fault.
    """
    by_name = {option.name: option for option in options}
    values: dict[str, Any] = {}
    warnings = []
    for key, value in _read(path).items():
        name = key.replace("-", "_")
        try:
            if name in by_name:
                if name in values:
                    raise ValueError("is there twice")
                if value is not None:
                    values[name] = _parsed(by_name[name], value)
                continue
            warning = foreign_setting(key, value)
        except ValueError as error:
            is_secret = name in by_name and by_name[name].is_secret
            reason = "it must be text; put it in quotes" if is_secret else error
            raise ConfigError(f"{path}: {key}: {reason}") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}") from None
        if warning is None:
            hint = did_you_mean(name, by_name)
            raise ConfigError(f"{path}: unknown setting {key}{hint}")
        warnings.append(f"{path}: {warning}")
    return values, warnings


def _read(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path}: not YAML in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it can't be read"
        raise ConfigError(f"{path}: not YAML{where}: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: settings must be a mapping, such as `port: 8000`")
    return {str(key): value for key, value in content.items()}


def _parsed(option: Option, value: Any) -> Any:
    if option.type is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(option.parse(_text(item, str)) for item in items)
    return option.parse(_text(value, option.type))


def _text(value: Any, wanted: type) -> str:
    """As a flag would have it.

    Text must be text in YAML too: an unquoted `0123` is the number 83, `no` is false.
    """
    if isinstance(value, str):
        return value
    if wanted is bool and type(value) in (bool, int):
        return str(value).lower()
    if wanted in (int, float) and type(value) in (int, float):
        return str(value)
    if isinstance(value, dict) and wanted not in (bool, int, float, str):
        return _json(value)
    shown = f"{value!s:.100}"
    raise ValueError(f"{shown} is no text; put it in quotes" if wanted is str else f"not {shown}")


def _json(value: dict[Any, Any]) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("holds what JSON can't") from None
