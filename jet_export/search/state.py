"""What a search has found so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from jet_export.search.cells import Cell
from jet_export.search.database import Latencies, Metric
from jet_export.search.evaluation import Evaluation
from jet_export.search.points import Point


@dataclass
class SearchState:
    """Filled in while the search runs; read by the reports."""

    evaluations: dict[Point, Evaluation] = field(default_factory=dict)
    layers: dict[Cell, Latencies] = field(default_factory=dict)  # what one such layer adds to a step
    base: Latencies = field(default_factory=dict)  # of the engine without layers
    failed: dict[Cell, str] = field(default_factory=dict)  # engines that could not be built or measured
    filled_by: dict[Cell, dict[Metric, str]] = field(default_factory=dict)  # "prefill" or "synthetic"
    inconsistent: dict[Metric, str] = field(default_factory=dict)  # metrics without predictions, and why
    noisy: int = 0  # measurements whose repeats disagree by over 10 %
    repeated: int = 0  # measurements that were repeated at all
    reason: str = ""  # why the chosen point was chosen
    timed_out: bool = False  # --timeout left something unmeasured
    seconds: float = 0.0
