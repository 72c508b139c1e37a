"""A point of the space, and all that is known of it: constraints, score, predicted and measured latency."""

from __future__ import annotations

from dataclasses import dataclass

from jet_export.model.config import JetNemotronConfig
from jet_export.search.database import Latencies, Metric
from jet_export.search.points import Point


@dataclass(kw_only=True)
class Evaluation:
    point: Point
    label: str
    refused: str | None = None  # why it is not built
    config: JetNemotronConfig | None = None
    parameters: int = 0
    cache_bytes: int = 0  # recurrent states and KV caches of one sequence at the target context
    conv_bytes: int = 0
    score: float | None = None
    predicted: Latencies | None = None  # the sum of its layers
    measured: Latencies | None = None  # of the whole model's engine
    missed: str | None = None  # which target it misses, or why it has no figure
    front: bool = False
    chosen: bool = False

    @property
    def buildable(self) -> bool:
        """Whether its engines are worth building: it is within the constraints and has a score."""
        return not self.refused and self.score is not None

    def tokens_per_s(
        self, batch: int, context: int, phase: str = "decode", latencies: Latencies | None = None
    ) -> float:
        """Throughput of the whole batch, from the predicted latencies unless others are given. NaN if unknown."""
        latencies = latencies if latencies is not None else self.predicted
        ms = latencies.get((batch, context, phase)) if latencies else None
        if not ms or ms <= 0:
            return float("nan")
        return 1e3 * batch * (context if phase == "prefill" else 1) / ms

    def error(self, metric: Metric) -> float | None:
        """Relative error of the prediction; None unless the point was measured whole."""
        if not self.measured or not self.predicted or metric not in self.measured or metric not in self.predicted:
            return None
        return self.predicted[metric] / self.measured[metric] - 1
