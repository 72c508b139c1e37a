"""Standard errors of a task's metrics, and of the paired difference to a baseline on the same documents.

A metric is either the mean of a value per document, or a ratio of sums, sum(x) / sum(w) (bits per byte: of nats and
bytes). With the value R, document i has the influence

    mean:   u_i = x_i - R                   ratio:   u_i = (x_i - R w_i) / mean(w)

and the standard error is sqrt(sum(u_i^2) / (n (n - 1))). Two models answer the same documents, so the difference has
the influence u_i - v_i of both: what documents have in common cancels, and small differences can be told from chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jet_export.utils.errors import JetExportError

RATIOS = {"bits_per_byte": -1 / math.log(2)}  # metric: what sum(x) / sum(w) is multiplied with
Value = float | tuple[float, float]  # of a document: x, or (x, w)


@dataclass(frozen=True)
class Estimate:
    """A metric over n documents."""

    value: float
    stderr: float | None  # None: of one document
    n: int


@dataclass(frozen=True)
class Metric:
    """A metric's values per document, by the document's number."""

    name: str
    values: Mapping[int, Value]

    def estimate(self) -> Estimate:
        value, influences = self._influences()
        return Estimate(value, standard_error(list(influences.values())), len(influences))

    def minus(self, baseline: Metric) -> Estimate:
        """The paired difference. Raises JetExportError where the documents are not the same."""
        if self.values.keys() != baseline.values.keys():
            raise JetExportError(f"{self.name}: the two bundles were not asked the same documents.")
        (a, u), (b, v) = self._influences(), baseline._influences()
        return Estimate(a - b, standard_error([u[i] - v[i] for i in u]), len(u))

    def _influences(self) -> tuple[float, dict[int, float]]:
        """(the metric, each document's influence on it)"""
        scale = RATIOS.get(self.name, 1.0)
        pairs = {i: v if isinstance(v, tuple) else (v, 1.0) for i, v in self.values.items()}
        weight = sum(w for _, w in pairs.values()) / len(pairs)
        value = sum(x for x, _ in pairs.values()) / len(pairs) / weight
        return scale * value, {i: scale * (x - value * w) / weight for i, (x, w) in pairs.items()}


def standard_error(influences: Sequence[float]) -> float | None:
    n = len(influences)
    return math.sqrt(sum(u * u for u in influences) / (n * (n - 1))) if n > 1 else None


def paired(value: object) -> Value | None:
    """A document's value as the harness has it; None for one that no mean is taken of (f1 and bleu keep texts)."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int | float) for v in value):
        return float(value[0]), float(value[1])
    return None
