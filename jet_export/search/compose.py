"""A whole model's latency from its layers': base + sum over layers of (cell - base) / layers in the cell.

Milliseconds of a decode step of the whole batch, and of the prefill of its whole context.
"""

from __future__ import annotations

from jet_export.model.config import JetNemotronConfig
from jet_export.search.cells import Cell, base_cell, layer_cells
from jet_export.search.database import Entry
from jet_export.search.points import Point
from jet_export.search.space import Space
from jet_export.search.work import Workshop

Latency = dict[tuple[int, int, str], float]  # (batch, context, phase) -> milliseconds


class Composer:
    """Predictions from what a workshop has measured."""

    def __init__(self, workshop: Workshop, preset: JetNemotronConfig, space: Space) -> None:
        self.workshop, self.preset, self.space = workshop, preset, space
        self.base = base_cell(preset)

    def entry(self, cell: Cell, case: tuple[int, int, str]) -> Entry | None:
        return self.workshop.known.get(cell, {}).get(case)

    def layer(self, cell: Cell, batch: int, context: int, phase: str) -> float | None:
        """One layer's share; None where it is not measured. Noise may make it negative where layers are tiny."""
        case = (batch, context, phase)
        whole, base = self.entry(cell, case), self.entry(self.base, case)
        return (whole.median_ms - base.median_ms) / cell.layers if whole and base else None

    def predict(self, point: Point) -> Latency | None:
        """Every case of the grid; None where a layer is not measured."""
        out: Latency = {}
        cells = layer_cells(point, self.preset, self.space)
        for batch, context in self.workshop.cases:
            for phase in ("decode", "prefill"):
                base = self.entry(self.base, (batch, context, phase))
                if base is None:
                    return None
                total = base.median_ms
                for cell, n in cells.items():
                    share = self.layer(cell, batch, context, phase)
                    if share is None:
                        return None
                    total += n * share
                out[batch, context, phase] = total
        return out

    def measured(self, cell: Cell) -> Latency | None:
        """Of a whole model's cell."""
        have = self.workshop.known.get(cell, {})
        return {case: e.median_ms for case, e in have.items()} if have and not self.workshop.missing(cell) else None

    def noisy(self, above: float = 0.1) -> tuple[int, int]:
        """(measurements whose repeats differ by more than `above`, those that were repeated)."""
        repeated = [e.details["every_ms"] for known in self.workshop.known.values() for e in known.values()
                    if len(e.details.get("every_ms", ())) > 1]  # fmt: skip
        return sum(sorted(r)[1] > (1 + above) * min(r) for r in repeated), len(repeated)
