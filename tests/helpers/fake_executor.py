"""A search with a fake executor: no engine is built, latencies follow a formula, every operation is counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.eager_bundle import mini_config
from jet_export.model.config import JetNemotronConfig
from jet_export.search.cells import Cell
from jet_export.search.database import Database, Entry, MeasurementSetup
from jet_export.search.run import run_search
from jet_export.search.search import Search
from jet_export.search.spec import SearchOptions, SearchSpec

SPACE = """
[jet]
sizes = ["32x32x2", "16x64x2", "64x16x2", "16x32x4"]
[measure]
batch = [1, 4]
context = [128, 256]
prefill_chunk = 64
"""


def layer_ms(config: JetNemotronConfig, i: int, batch: int, context: int, phase: str) -> float:
    """Grows with the layer's sizes, the batch and, for attention, the context."""
    kind = config.layer_types[i]
    if kind == "jet":
        H, K, V = config.jet_dims(i)
        work = 1e-4 * H * (K + 2 * V) * batch
    else:
        seen = min(context, config.window_size) if kind == "swa" else context
        work = 1e-4 * seen * batch
    return work * (context if phase == "prefill" else 1)


def engine_ms(cell: Cell, batch: int, context: int, phase: str) -> float:
    layers = range(cell.config.num_hidden_layers)
    return 1.0 + 0.01 * batch + sum(layer_ms(cell.config, i, batch, context, phase) for i in layers)


class FakeExecutor:
    """Counts builds and measurements; after `die_after` operations it raises KeyboardInterrupt, as Ctrl-C would.

    Whole engines take `whole` times their layers' sum; `repeats` gives a factor for each repeat of a phase.
    """

    def __init__(
        self,
        database: Database,
        setup: MeasurementSetup,
        *,
        die_after: int | None = None,
        whole: float = 1.0,
        filled_by: str = "",
        repeats: Callable[[Cell, str], list[float]] = lambda cell, phase: [1.0],
    ) -> None:
        self.whole, self.filled_by, self.repeats = whole, filled_by, repeats
        self.database, self.setup, self.die_after = database, setup, die_after
        self.bundles = database.path.with_suffix(".bundles")
        self.builds: Counter[str] = Counter()
        self.measured: Counter[tuple[str, int, int]] = Counter()
        self.lock = threading.Lock()
        self.operations = 0

    def count_operation(self) -> None:
        with self.lock:
            if self.die_after is not None and self.operations >= self.die_after:
                raise KeyboardInterrupt
            self.operations += 1

    remote = False

    def built(self, cell: Cell) -> bool:
        return (self.bundles / cell.key).exists()

    def build(self, cell: Cell) -> None:
        if self.built(cell):
            return
        self.count_operation()
        self.bundles.mkdir(exist_ok=True)
        (self.bundles / cell.key).touch()
        self.builds[cell.key] += 1

    def measure(self, cell: Cell, cases: list[tuple[int, int]]) -> None:
        for batch, context in cases:
            self.count_operation()
            self.measured[cell.key, batch, context] += 1
            entries = []
            for phase in ("decode", "prefill"):
                ms = engine_ms(cell, batch, context, phase) * (self.whole if cell.kind == "whole" else 1.0)
                details = {"filled_by": self.filled_by} if self.filled_by else {}
                every = [ms * factor for factor in self.repeats(cell, phase)]
                entries.append(
                    Entry(
                        batch=batch,
                        context=context,
                        phase=phase,
                        median_ms=min(every),
                        p90_ms=max(every),
                        details={**details, "every_ms": every},
                    )
                )
            self.database.put(self.setup, cell, entries)

    def discard(self, cell: Cell) -> None:
        (self.bundles / cell.key).unlink(missing_ok=True)

    def stop(self) -> None:
        pass


def write_model(directory: Path, **changes: Any) -> Path:
    path = directory / "mini.json"
    mini_config(**changes).save(path)
    return path


def prepared(directory: Path, space: str = SPACE, model: Path | None = None, **options: Any) -> Search:
    """A search of the mini config."""
    path = directory / "space.toml"
    path.write_text(space)
    model = model or write_model(directory)
    defaults = {"device": "cpu", "output": directory / "out", "database": directory / "m.db", "dtype": "float32"}
    options = {**defaults, **options}
    return Search(SearchSpec.from_options(SearchOptions(model=str(model), space=path, **options)))


def searched(
    search: Search, *, die_after: int | None = None, lines: list[str] | None = None, **more: Any
) -> FakeExecutor:
    """Run the search with a FakeExecutor, and return it."""
    database = Database(search.spec.database_file)
    executor = FakeExecutor(database, search.spec.setup, die_after=die_after, **more)
    run_search(search, (lines if lines is not None else []).append, executor)
    return executor
