"""Subprocesses (worker.py) that build and measure cells.

Each build has a process of its own. Measurements share one, since starting it takes longer than most of them; after one
that fails, the next gets a new process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jet_export.search.cells import Cell
from jet_export.search.database import Database, MeasurementSetup
from jet_export.search.processes import TASK_TIMEOUT, Builds, ProcessFailed, WorkerProcess
from jet_export.utils.errors import JetExportError


class Executor(Protocol):
    """Builds and measures cells, several at a time. `build` and `measure` raise JetExportError if they fail."""

    @property
    def remote(self) -> bool:
        """Whether it works on other machines, so that this one need not be kept idle."""

    def built(self, cell: Cell) -> bool:
        """Whether the cell's bundle is there."""

    def build(self, cell: Cell) -> None: ...

    def measure(self, cell: Cell, cases: list[tuple[int, int]]) -> None:
        """Write the latencies at these (batch, context) to the database."""

    def discard(self, cell: Cell) -> None:
        """Remove the cell's bundle."""

    def stop(self) -> None:
        """End whatever is running."""


@dataclass(kw_only=True)
class SubprocessExecutor:
    """An Executor that runs subprocesses."""

    database: Database
    setup: MeasurementSetup
    device: str
    directory: Path  # of the bundles
    max_batch_size: int
    max_seq_len: int
    jobs: int = 1  # builds at a time
    decode_one: bool = True  # batch 1 is measured too
    builds: Builds = field(default_factory=Builds)
    measuring_process: WorkerProcess | None = None

    @property
    def remote(self) -> bool:
        return False

    @cached_property
    def home(self) -> Path:
        """Of bundles built for this machine, these kernels and these limits, so that no others are used."""
        limits = [self.max_batch_size, self.max_seq_len, self.decode_one]
        built_for = json.dumps([asdict(self.setup), *limits], sort_keys=True)
        return self.directory / hashlib.sha256(built_for.encode()).hexdigest()[:12]

    def bundle(self, cell: Cell) -> Path:
        return self.home / cell.key

    def built(self, cell: Cell) -> bool:
        """A build writes to another directory and renames it last, so a manifest means a complete bundle."""
        return (self.bundle(cell) / "manifest.json").exists()

    def build(self, cell: Cell) -> None:
        for unfinished in self.home.glob(f".{cell.key}.*"):  # of a build that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        if self.built(cell):
            return
        task = {
            "backend": self.setup.backend,
            "device": self.device,
            "dtype": self.setup.dtype,
            "max_batch_size": self.max_batch_size,
            "max_seq_len": self.max_seq_len,
            "prefill_chunk": self.setup.chunk,
            "decode_one": self.decode_one,
        }
        self.run_build({**self.common(cell), **task}, cell)

    def measure(self, cell: Cell, cases: list[tuple[int, int]]) -> None:
        task = {"database": str(self.database.path), "setup": asdict(self.setup), "cases": cases}
        if self.measuring_process is not None and not self.measuring_process.alive:
            self.end_measuring_process()  # something killed it between two cells
        worker = self.measuring_process = self.measuring_process or WorkerProcess.start()
        try:
            worker.answer({**self.common(cell), **task}, TASK_TIMEOUT)
        except ProcessFailed as e:
            self.end_measuring_process()
            raise JetExportError(f"{cell}: measure {e}") from None
        except BaseException:
            self.end_measuring_process()
            raise

    def end_measuring_process(self) -> None:
        if self.measuring_process is not None:
            self.measuring_process.end()
        self.measuring_process = None

    def discard(self, cell: Cell) -> None:
        shutil.rmtree(self.bundle(cell), ignore_errors=True)
        self.bundle(cell).with_suffix(".json").unlink(missing_ok=True)

    def common(self, cell: Cell) -> dict[str, Any]:
        """What every task says."""
        return {"cell": cell.describe(), "bundle": str(self.bundle(cell)), "parent": os.getpid()}

    def run_build(self, task: dict[str, Any], cell: Cell) -> None:
        try:
            self.builds.run(task, max(1, (os.cpu_count() or 1) // self.jobs))
        except ProcessFailed as e:
            raise JetExportError(f"{cell}: build {e}") from None

    def stop(self) -> None:
        self.builds.stop()
        self.end_measuring_process()
