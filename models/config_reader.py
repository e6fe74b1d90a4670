"""Read fields of a config.json with checks that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ConfigError
from .families import FAMILIES

__all__ = ["FARTHEST", "ConfigReader"]

# Far above any size and any position of a real model; larger numbers would overflow before they could be refused.
_LARGEST, FARTHEST = 2**20, 2**31 - 1


class ConfigReader:
    """Reads fields of a config.json whose family is in `FAMILIES`; errors name the field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.family = FAMILIES[config["model_type"]]

    def whole(self, name: str, default: int | None = None, most: int = _LARGEST) -> int:
        """Return a whole number from 1 to `most`.

        Raises:
            ConfigError: if the field has another value.
        """
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(f"config.json, '{name}': expected a whole number from 1 to {most}; found {value!r:.40}")
        return value

    def number(self, name: str, default: float | None) -> float:
        """Return a number above 0.

        Raises:
            ConfigError: if the field has another value.
        """
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < FARTHEST:
            raise ConfigError(f"config.json, '{name}': expected a number above 0; found {value!r:.40}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean.

        Raises:
            ConfigError: if the field has another value.
        """
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"config.json, '{name}': expected true or false; found {value!r}")
        return value
