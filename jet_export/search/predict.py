"""Predicts a whole model's latency from its layers': base + sum over layers of (cell - base) / layers in the cell.

In milliseconds, of a decode step of the whole batch and of the prefill of its whole context.
"""

from __future__ import annotations

from jet_export.model.config import JetNemotronConfig
from jet_export.search.cells import Cell, base_cell, layer_cells
from jet_export.search.database import PHASES, TOLERANCE, Entry, Latencies, Metric
from jet_export.search.measurer import Measurer
from jet_export.search.points import Point
from jet_export.search.space import Space


class Predictor:
    """Predictions from what a Measurer has measured."""

    def __init__(self, measurer: Measurer, preset: JetNemotronConfig, space: Space) -> None:
        self.measurer, self.preset, self.space = measurer, preset, space
        self.base = base_cell(preset)

    @property
    def metrics(self) -> list[Metric]:
        return [(batch, context, phase) for batch, context in self.measurer.cases for phase in PHASES]

    def entry(self, cell: Cell, metric: Metric) -> Entry | None:
        return self.measurer.known.get(cell, {}).get(metric)

    def layer(self, cell: Cell, metric: Metric) -> float | None:
        """What one layer adds; None if it is not measured. Noise may make it negative where layers are tiny."""
        with_layers, base = self.entry(cell, metric), self.entry(self.base, metric)
        return (with_layers.median_ms - base.median_ms) / cell.layers if with_layers and base else None

    def inconsistency(self, metric: Metric) -> str | None:
        """Why this metric cannot be predicted: an engine with layers was faster than the engine without."""
        base = self.entry(self.base, metric)
        if base is None:
            return None
        known = ((cell, entries.get(metric)) for cell, entries in self.measurer.known.items() if cell.kind != "whole")
        measured = ((entry.median_ms, cell) for cell, entry in known if entry)
        ms, cell = min(measured, key=lambda part: part[0])  # never empty: the base itself is one
        if ms * (1 + TOLERANCE) >= base.median_ms:
            return None
        batch, context, phase = metric
        return (
            f"{phase} at B{batch} {context}: {cell} took {ms:,.4g} ms, the engine without layers "
            f"{base.median_ms:,.4g}; was the machine in use?"
        )

    def predict(self, point: Point) -> Latencies | None:
        """Every metric but the inconsistent ones; None if a layer is not measured."""
        cells = layer_cells(point, self.preset, self.space)
        predicted: Latencies = {}
        for metric in self.metrics:
            base = self.entry(self.base, metric)
            if base is None:
                return None
            total = base.median_ms
            for cell, n in cells.items():
                ms = self.layer(cell, metric)
                if ms is None:
                    return None
                total += n * ms
            if not self.inconsistency(metric):
                predicted[metric] = total
        return predicted

    def measured(self, cell: Cell) -> Latencies | None:
        """The latencies of a whole model's engine; None unless it is measured completely."""
        known = self.measurer.known.get(cell, {})
        if not known or self.measurer.missing(cell):
            return None
        return {metric: e.median_ms for metric, e in known.items()}

    def count_noisy(self) -> tuple[int, int]:
        """(measurements whose repeats disagree, measurements with repeats)."""
        confirmed = [e.confirmed for entries in self.measurer.known.values() for e in entries.values()]
        return confirmed.count(False), len(confirmed) - confirmed.count(None)
