"""Builds cells in parallel, measures them one at a time on each device, and keeps the latencies in the database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from jet_export.search.cells import Cell
from jet_export.search.database import PHASES, Database, Entry, MeasurementSetup, Metric
from jet_export.search.executor import Executor
from jet_export.search.locks import Claim, building, measuring
from jet_export.utils.errors import JetExportError
from jet_export.utils.progress import Progress

T = TypeVar("T")


def never(cell: Cell, entry: Entry) -> bool:
    return False


@dataclass(kw_only=True)
class Measurer:
    """Measures the cells it is asked for, unless the database has them or another search measures them already."""

    database: Database
    setup: MeasurementSetup
    executor: Executor
    cases: list[tuple[int, int]]  # (batch, context)
    claims: Path  # directory of the cells' locks
    jobs: int  # builds at a time
    devices: int = 1  # measurements at a time
    emit: Callable[[str], None]
    deadline: float | None = None  # time.monotonic() after which no further build begins
    keep_engines: bool = False
    outdated: Callable[[Cell, Entry], bool] = never  # whether to measure again what the database has

    known: dict[Cell, dict[Metric, Entry]] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)
    measured_now: set[Cell] = field(default_factory=set)  # by this search
    discarded: set[Cell] = field(default_factory=set)
    seconds: float = 0.0  # of the builds and measurements so far
    finished: int = 0  # cells that these took

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def entries(self, cell: Cell) -> dict[Metric, Entry]:
        """What is known of a cell, read from the database as far as it is not complete."""
        known = self.known.setdefault(cell, {})
        if len(known) < len(PHASES) * len(self.cases):
            for batch, context in self.cases:
                for phase, entry in self.database.get(self.setup, cell, batch, context).items():
                    if cell in self.measured_now or not self.outdated(cell, entry):
                        known[batch, context, phase] = entry
        return known

    def missing(self, cell: Cell) -> list[tuple[int, int]]:
        """The cases of a cell that are not measured."""
        known = self.entries(cell)
        return [(b, c) for b, c in self.cases if any((b, c, phase) not in known for phase in PHASES)]

    def ensure(self, cells: Iterable[Cell]) -> None:
        """Measure what is missing. A cell that fails is recorded in `failed` and not tried again."""
        wanted = list(dict.fromkeys(cells))
        self.discard_leftovers(c for c in wanted if not self.missing(c))
        pending = self.pending(wanted)
        total, notified = len(pending), False
        with Progress(self.emit).stage("engines", total, lines=False) as stage:
            while pending:
                with self.claimed(pending, self.jobs) as mine:
                    missing = [c for c in mine if self.missing(c)]
                    self.build_and_measure(missing, total=total, before=total - len(pending))
                if not mine:
                    if not notified:
                        self.emit(f"  waiting for another search, which measures {len(pending)} of the engines")
                    notified = True
                    time.sleep(0.5)
                pending = self.pending(pending)
                stage.at(total - len(pending))

    def pending(self, cells: list[Cell]) -> list[Cell]:
        """Cells that can still be measured; when time is up, only those that are built already."""
        pending = [c for c in cells if c not in self.failed and self.missing(c)]
        return [c for c in pending if self.executor.built(c)] if self.out_of_time else pending

    def build_only(self, cells: Iterable[Cell]) -> tuple[int, int]:
        """Build what is not measured, for a later search to measure: (built, failed)."""
        with self.claimed(c for c in dict.fromkeys(cells) if self.missing(c)) as mine:
            return sum(self.build_all(mine)), len(self.failed)

    @contextmanager
    def claimed(self, cells: Iterable[Cell], most: int | None = None) -> Iterator[list[Cell]]:
        """Lock up to `most` cells that no other search has locked; released at the end of the block."""
        claims: dict[Cell, Claim] = {}
        try:
            for cell in cells:
                if most is not None and len(claims) >= most:
                    break
                claim = Claim.take(self.claims / f"{cell.key}.lock")
                if claim is not None:
                    claims[cell] = claim
            yield list(claims)
        finally:
            for claim in claims.values():
                claim.release()

    def discard_leftovers(self, measured: Iterable[Cell]) -> None:
        """Remove bundles of measured cells: a kill between measurement and removal leaves them."""
        if self.keep_engines:
            return
        for cell in measured:
            if cell in self.discarded:
                continue
            self.discarded.add(cell)
            with self.claimed([cell]) as mine:
                if mine:
                    self.executor.discard(cell)

    def build_and_measure(self, cells: list[Cell], *, total: int, before: int) -> None:
        """Build these together, then measure one after the other; `before` of `total` cells are done already."""
        if not cells:
            return
        start = time.monotonic()
        built = [c for c, ok in zip(cells, self.build_all(cells), strict=True) if ok]
        for n, cell in enumerate(self.in_parallel(self.measure, built, self.devices), before + 1):
            self.seconds += time.monotonic() - start
            start = time.monotonic()
            self.finished += 1
            if cell not in self.failed:
                self.emit(f"  [{n}/{total}] {cell}: {self.figures(cell)}{self.time_left(total - n)}")

    def build_all(self, cells: list[Cell]) -> list[bool]:
        """In parallel; whether each of them is built."""
        return list(self.in_parallel(self.build, cells, self.jobs))

    def in_parallel(self, do: Callable[[Cell], T], cells: list[Cell], most: int) -> Iterator[T]:
        """`do` of each, in their order, up to `most` at once. After an exception no further one begins."""
        pool = ThreadPoolExecutor(most)
        try:
            yield from pool.map(do, cells)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.executor.stop()
            raise
        finally:
            pool.shutdown()

    def build(self, cell: Cell) -> bool:
        if self.out_of_time and not self.executor.built(cell):
            return False
        try:
            with nullcontext() if self.executor.remote else building():
                self.executor.build(cell)
        except JetExportError as e:
            self.fail(cell, e)
            return False
        return True

    def measure(self, cell: Cell) -> Cell:
        def waits() -> None:
            self.emit(f"  {cell}: waiting for another search's builds and measurements")

        try:
            with nullcontext() if self.executor.remote else measuring(waits):
                self.executor.measure(cell, self.missing(cell))
            self.measured_now.add(cell)
            if self.missing(cell):
                raise JetExportError(f"{cell}: measured, but not found in the database.")
        except JetExportError as e:
            self.fail(cell, e)
        if not self.keep_engines:
            self.executor.discard(cell)
        return cell

    def fail(self, cell: Cell, e: JetExportError) -> None:
        self.failed[cell] = str(e).replace("\n", " ")
        self.emit(f"  {self.failed[cell]}")

    def figures(self, cell: Cell) -> str:
        """The latencies at the target, in words."""
        batch, context = self.cases[-1]
        known = self.entries(cell)
        decode, prefill = known[batch, context, "decode"], known[batch, context, "prefill"]
        return f"decode {decode.median_ms:.4g} ms, prefill {prefill.median_ms:.4g} ms at B{batch} {context}"

    def time_left(self, cells: int) -> str:
        return f"; about {cells * self.seconds / self.finished:.0f} s left" if cells > 0 and self.finished else ""
