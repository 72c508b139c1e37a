"""A whole model's latency from its layers': base + sum over layers of (cell - base) / layers in the cell.

Milliseconds of a decode step of the whole batch, and of the prefill of its whole context.
"""

from __future__ import annotations

from jet_export.model.config import JetNemotronConfig
from jet_export.search.cells import Cell, base_cell, layer_cells
from jet_export.search.database import AGREE, Entry
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

    def at_odds(self, case: tuple[int, int, str]) -> str | None:
        """Why no sum of this case says anything: an engine of layers that was quicker than the one without any."""
        base = self.entry(self.base, case)
        if base is None:
            return None
        parts = ((e.median_ms, cell) for cell, known in self.workshop.known.items()
                 if cell.kind != "whole" and (e := known.get(case)))  # fmt: skip
        ms, cell = min(parts, key=lambda part: part[0])  # the base's own at least
        if ms * (1 + AGREE) >= base.median_ms:
            return None
        return (f"{case[2]} at B{case[0]} {case[1]}: {cell} took {ms:,.4g} ms, the engine without layers "
                f"{base.median_ms:,.4g}; was the machine in use?")  # fmt: skip

    def predict(self, point: Point) -> Latency | None:
        """Every case of the grid but those at odds; None where a layer is not measured."""
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
                if not self.at_odds((batch, context, phase)):
                    out[batch, context, phase] = total
        return out

    def measured(self, cell: Cell) -> Latency | None:
        """Of a whole model's cell."""
        have = self.workshop.known.get(cell, {})
        return {case: e.median_ms for case, e in have.items()} if have and not self.workshop.missing(cell) else None

    def noisy(self) -> tuple[int, int]:
        """(measurements that their repeats do not confirm, those that were repeated)."""
        known = [e.confirmed for cases in self.workshop.known.values() for e in cases.values()]
        return known.count(False), known.count(False) + known.count(True)
