"""Values of a `config.json`, checked when they are read: the file may hold anything."""

import math
from collections.abc import Mapping
from typing import Any

from bezel.engine.errors import CheckpointError

# Far above every Gemma, and small enough for the products of three of them to fit into 64 bits.
MAX_COUNT = 1 << 20
MAX_TOKENS = 1 << 24  # of a vocabulary or a context


class ConfigValues:
    """The object at `place` in the file; without a default a value has to be there.

    A value of null counts as none, as in transformers. Every method raises CheckpointError, naming
    the value, if it is missing or can't be.
    """

    def __init__(self, values: Any, place: str = "config.json") -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{place} is {values!r}, not an object")
        self.values, self.place = values, place

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def fail(self, key: str, problem: str) -> CheckpointError:
        """To be raised."""
        return CheckpointError(f"{self.place}: {key} is {self.values.get(key)!r}, {problem}")

    def count(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_COUNT
    ) -> int:
        """A whole number from `low` to `high`."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"not a whole number from {low} to {high:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise self.fail(key, "not a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "not true or false")
        return value

    def words(self, key: str) -> list[str]:
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.fail(key, "not a list of strings")
        return value

    def object(self, key: str) -> "ConfigValues":
        """An object in this one; empty where there is none."""
        return ConfigValues(self._value(key, {}), f"{self.place}: {key}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.place} has no value for {key!r}")
        return value
