"""Standard errors of a task's metrics, and of the paired difference to a baseline on the same documents.

A metric is f(R). R is the mean of a value per document, or a ratio of sums, sum(x) / sum(w) (bits per byte: of nats and
bytes), a mean having w = 1; f is the identity, or what makes bits or a perplexity of log probabilities. To first order
document i changes it by its influence

    u_i = f'(R) (x_i - R w_i) / mean(w)

and the standard error is sqrt(sum(u_i^2) / (n (n - 1))). Two models answer the same documents, so the difference has
the influence u_i - v_i of both: what documents have in common cancels, and small differences can be told from chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jet_export.utils.errors import JetExportError

Function = Callable[[float], float]


def identity(r: float) -> float:
    return r


def perplexity(r: float) -> float:
    return math.exp(-r)


# Metric: f and f', of the harness's log probabilities.
BITS = (lambda r: -r / math.log(2), lambda r: -1 / math.log(2))
PERPLEXITY = (perplexity, lambda r: -math.exp(-r))
FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "bits_per_byte": BITS,
    "byte_perplexity": PERPLEXITY,
    "word_perplexity": PERPLEXITY,
    "perplexity": PERPLEXITY,
}
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
        f, slope = FUNCTIONS.get(self.name.split(",")[0], (identity, lambda r: 1.0))
        pairs = {i: v if isinstance(v, tuple) else (v, 1.0) for i, v in self.values.items()}
        weight = sum(w for _, w in pairs.values()) / len(pairs)
        r = sum(x for x, _ in pairs.values()) / len(pairs) / weight
        return f(r), {i: slope(r) * (x - r * w) / weight for i, (x, w) in pairs.items()}


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
