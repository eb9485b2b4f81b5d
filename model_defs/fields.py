"""Typed access to the fields of a configuration file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shardwright.errors import ConfigError


class Reader:
    """Typed access to a config; `prefix` goes before field names in messages.

    A key that is null counts as absent, as in transformers.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix

    def fail(self, key: str, expected: str) -> ConfigError:
        """The error for a field that is missing or not as `expected`."""
        if self.values.get(key) is None:
            return ConfigError(f"{self.prefix}{key}: missing; expected {expected}")
        return ConfigError(f"{self.prefix}{key}: expected {expected}, got {self.values[key]!r}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(key, "a positive integer")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """An integer that is not negative."""
        return 0 if self.values.get(key) == 0 else self.integer(key, default)

    def maybe_integer(self, key: str) -> int | None:
        """A positive integer, or None if the field is absent."""
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.fail(key, "a positive number")
        if not 0 < value < math.inf:
            raise self.fail(key, "a positive number")
        return float(value)

    def maybe_number(self, key: str) -> float | None:
        """A positive finite number, or None if the field is absent."""
        return None if self.values.get(key) is None else self.number(key)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive finite numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or not value:
            raise self.fail(key, "a list of positive numbers")
        return tuple(Reader({key: item}, self.prefix).number(key) for item in value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """One of the strings `choices`."""
        value = self.values.get(key)
        value = default if value is None else value
        if value not in choices:
            raise self.fail(key, f"{' or '.join(map(repr, choices))}, which is all we support")
        return str(value)

    def tokens(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.fail(key, "a token id or a list of token ids")
        return tuple(ids)
