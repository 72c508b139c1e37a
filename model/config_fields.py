"""Typed access to the fields of a config.json: one message for a field that is missing or of a wrong type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jet_export.utils.errors import JetExportError

NO_TOKEN = -1  # null: the model has no such token


class Fields:
    """The fields of one JSON object. Messages name its file, `where`, and the keys that lead to it, `path` ("jet.")."""

    def __init__(self, values: Mapping[str, Any], where: str, path: str = "") -> None:
        self.values, self.where, self.path = values, where, path

    def wrong(self, name: str, wanted: str) -> JetExportError:
        value = self.values[name]
        return JetExportError(
            f"{self.where}: field {self.path + name!r} has a wrong type: it is {value!r}, not {wanted}."
        )

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise JetExportError(f"{self.where}: field {self.path + name!r} is missing.")
        return default

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer, required without a default. 64.0 is one, 64.5 and "64" are not."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise self.wrong(name, "an integer")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number, or one in a string, as the published norm_eps is."""
        value = self._value(name, default)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.wrong(name, "a finite number")
        return number

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def token(self, name: str) -> int:
        """A token id; the first of a list; NO_TOKEN for null."""
        value = self.values.get(name)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            return NO_TOKEN
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "a token id")
        return value

    def object(self, name: str) -> Fields:
        """The object under this name; an empty one where it is absent or null."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, self.where, f"{self.path}{name}.")

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name) or ()
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise self.wrong(name, "a list of strings")
        return tuple(value)
