"""Building cells in parallel and measuring them alone, in processes of their own; what is measured is kept.

A build is a process. Measurements share one, since starting it takes longer than most of them; it ends with the first
that fails, and the next cell gets a fresh one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

from jet_export.search.cells import Cell
from jet_export.search.database import PHASES, Bench, Database, Entry
from jet_export.search.locks import Claim, building, measuring
from jet_export.utils.errors import JetExportError

LONGEST = 3600  # seconds of one build or measurement


class Hands(Protocol):
    """What builds and measures one cell. Both raise JetExportError where it cannot."""

    def built(self, cell: Cell) -> bool: ...

    def build(self, cell: Cell) -> None: ...

    def measure(self, cell: Cell, cases: list[tuple[int, int]]) -> None: ...

    def discard(self, cell: Cell) -> None: ...

    def stop(self) -> None: ...


@dataclass
class Measurer:
    """The process that measures: a line of JSON to it is a task, a line from it is the answer."""

    process: subprocess.Popen
    errors: IO[str]  # what it says on standard error

    @classmethod
    def start(cls) -> Measurer:
        errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `end`)
        command = [sys.executable, "-m", "jet_export.search.worker", "measure"]
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True), errors)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, task: dict[str, Any], seconds: float) -> str | None:
        """Its answer's line, "" where it died of the task; None where it took too long, and was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return None if late.is_set() else line

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            if file is not None:
                with suppress(BrokenPipeError):
                    file.close()


@dataclass
class Processes:
    """Hands that are subprocesses."""

    database: Database
    bench: Bench
    device: str
    directory: Path
    max_batch_size: int
    max_seq_len: int
    jobs: int = 1  # builds side by side
    decode_one: bool = True  # a sequence alone is measured too
    running: set[subprocess.Popen] = field(default_factory=set)
    measurer: Measurer | None = None

    @cached_property
    def home(self) -> Path:
        """Bundles of this very machine, these kernels and limits: those of others are not taken for them."""
        same = json.dumps([asdict(self.bench), self.max_batch_size, self.max_seq_len, self.decode_one], sort_keys=True)
        return self.directory / hashlib.sha256(same.encode()).hexdigest()[:12]

    def bundle(self, cell: Cell) -> Path:
        return self.home / cell.key

    def built(self, cell: Cell) -> bool:
        """Built ahead, or before the search was killed: a build renames its directory as its last step."""
        return (self.bundle(cell) / "manifest.json").exists()

    def build(self, cell: Cell) -> None:
        for left in self.home.glob(f".{cell.key}.*"):  # of a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        if self.built(cell):
            return
        self.run("build", cell, {"backend": self.bench.backend, "device": self.device, "dtype": self.bench.dtype,
                                 "max_batch_size": self.max_batch_size, "max_seq_len": self.max_seq_len,
                                 "prefill_chunk": self.bench.chunk, "decode_one": self.decode_one})  # fmt: skip

    def measure(self, cell: Cell, cases: list[tuple[int, int]]) -> None:
        task = self.told(cell, {"database": str(self.database.path), "bench": asdict(self.bench), "cases": cases})
        if self.measurer is not None and not self.measurer.alive:  # killed from outside, between two cells
            self.end_measurer()
        self.measurer = self.measurer or Measurer.start()
        try:
            line = self.measurer.ask(task, LONGEST)
            if line is None:
                raise JetExportError(f"{cell}: measure took over {LONGEST} s.")
            if json.loads(line or "null") != {}:
                code = 1 if line else self.measurer.process.wait()
                raise JetExportError(f"{cell}: measure failed: {why(code, line, self.measurer.said())}")
        except BaseException:
            self.end_measurer()
            raise

    def end_measurer(self) -> None:
        if self.measurer is not None:
            self.measurer.end()
        self.measurer = None

    def discard(self, cell: Cell) -> None:
        shutil.rmtree(self.bundle(cell), ignore_errors=True)
        self.bundle(cell).with_suffix(".json").unlink(missing_ok=True)

    def told(self, cell: Cell, more: dict[str, Any]) -> dict[str, Any]:
        return {"cell": cell.describe(), "bundle": str(self.bundle(cell)), "parent": os.getpid(), **more}

    def run(self, task: str, cell: Cell, more: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "jet_export.search.worker", task]
        pipe = subprocess.PIPE
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))  # else each build starts one a core
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
            self.running.add(process)
            try:
                out, err = process.communicate(json.dumps(self.told(cell, more)), timeout=LONGEST)
            except subprocess.TimeoutExpired:
                process.kill()
                raise JetExportError(f"{cell}: {task} took over {LONGEST} s.") from None
            except BaseException:
                process.kill()
                raise
            finally:
                self.running.discard(process)
        if process.returncode:
            raise JetExportError(f"{cell}: {task} failed: {why(process.returncode, out, err)}")

    def stop(self) -> None:
        for process in list(self.running):
            process.kill()
        self.end_measurer()


def why(returncode: int, out: str, err: str) -> str:
    """The worker's own words, or how it died."""
    for line in reversed(out.splitlines()):
        try:
            return str(json.loads(line)["error"])
        except (ValueError, KeyError, TypeError):
            continue
    if returncode < 0:
        return f"its process died of {signal.Signals(-returncode).name}"
    return (err.strip().splitlines() or [f"exit status {returncode}"])[-1]


class Workshop:
    """Sees to it that cells are measured. `deadline`: monotonic seconds after which no further build begins."""

    def __init__(
        self, database: Database, bench: Bench, hands: Hands, cases: list[tuple[int, int]], claims: Path,
        jobs: int, emit: Callable[[str], None], deadline: float | None = None, keep: bool = False,
        doubted: Callable[[Cell, Entry], bool] = lambda cell, entry: False,
    ) -> None:  # fmt: skip
        """doubted: whether an entry of the database is to be measured again."""
        self.database, self.bench, self.hands, self.cases = database, bench, hands, cases
        self.claims, self.jobs, self.emit, self.deadline, self.keep = claims, max(1, jobs), emit, deadline, keep
        self.doubted = doubted
        self.failed: dict[Cell, str] = {}
        self.fresh: set[Cell] = set()  # measured here
        self.swept: set[Cell] = set()
        self.known: dict[Cell, dict[tuple[int, int, str], Entry]] = {}
        self.spent = 0.0  # seconds of builds and measurements
        self.done = 0  # cells that took them

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def entries(self, cell: Cell) -> dict[tuple[int, int, str], Entry]:
        """What is measured of a cell, by batch, context and phase."""
        known = self.known.setdefault(cell, {})
        if len(known) < len(PHASES) * len(self.cases):
            for batch, context in self.cases:
                for phase, entry in self.database.get(self.bench, cell, batch, context).items():
                    if cell in self.fresh or not self.doubted(cell, entry):
                        known[batch, context, phase] = entry
        return known

    def missing(self, cell: Cell) -> list[tuple[int, int]]:
        have = self.entries(cell)
        return [(b, c) for b, c in self.cases if any((b, c, phase) not in have for phase in PHASES)]

    def ensure(self, cells: Iterable[Cell]) -> None:
        """Measure what is missing. A cell that fails is named in `failed`, and not tried again."""
        wanted = list(dict.fromkeys(cells))
        self.sweep(c for c in wanted if not self.missing(c))
        waiting = self.left(wanted)
        total, told = len(waiting), False
        while waiting:
            mine: dict[Cell, Claim] = {}
            for cell in waiting:
                claim = Claim.take(self.claims / f"{cell.key}.lock") if len(mine) < self.jobs else None
                if claim is not None:
                    mine[cell] = claim
            try:
                self.work([c for c in mine if self.missing(c)], total, total - len(waiting))
            finally:
                for claim in mine.values():
                    claim.release()
            if not mine:
                if not told:
                    self.emit(f"  {len(waiting)} engines are another search's: waits for them")
                told = True
                time.sleep(0.5)
            waiting = self.left(waiting)

    def left(self, cells: list[Cell]) -> list[Cell]:
        """Those that can still be measured: when time is up, what is built already."""
        left = [c for c in cells if c not in self.failed and self.missing(c)]
        return [c for c in left if self.hands.built(c)] if self.out_of_time else left

    def build_ahead(self, cells: Iterable[Cell]) -> tuple[int, int]:
        """Build what is not measured, and leave it for a later search to measure: (built, failed)."""
        mine: dict[Cell, Claim] = {}
        try:
            for cell in dict.fromkeys(cells):
                claim = Claim.take(self.claims / f"{cell.key}.lock") if self.missing(cell) else None
                if claim is not None:
                    mine[cell] = claim
            return sum(self.build_all(list(mine))), len(self.failed)
        finally:
            for claim in mine.values():
                claim.release()

    def sweep(self, measured: Iterable[Cell]) -> None:
        """Remove what a kill between measurement and removal left of cells that are measured."""
        for cell in measured:
            if self.keep or cell in self.swept:
                continue
            self.swept.add(cell)
            claim = Claim.take(self.claims / f"{cell.key}.lock")
            if claim is not None:
                self.hands.discard(cell)
                claim.release()

    def work(self, cells: list[Cell], total: int, before: int) -> None:
        """Build these together, then measure one after the other."""
        if not cells:
            return
        start = time.monotonic()
        built = [c for c, ok in zip(cells, self.build_all(cells), strict=True) if ok]
        for i, cell in enumerate(built):
            self.measure(cell)
            self.spent += time.monotonic() - start
            start = time.monotonic()
            self.done += 1
            if cell not in self.failed:
                self.emit(
                    f"  [{before + i + 1}/{total}] {cell}: {self.figures(cell)}{self.eta(total - before - i - 1)}"
                )

    def build_all(self, cells: list[Cell]) -> list[bool]:
        """Side by side: which of them are there."""
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                return list(pool.map(self.build, cells))
            except BaseException:
                self.hands.stop()
                raise

    def build(self, cell: Cell) -> bool:
        if self.out_of_time and not self.hands.built(cell):
            return False
        try:
            with building():
                self.hands.build(cell)
        except JetExportError as e:
            self.fail(cell, e)
            return False
        return True

    def measure(self, cell: Cell) -> None:
        try:
            with measuring(lambda: self.emit(f"  {cell}: waits for another search, to be measured alone")):
                self.hands.measure(cell, self.missing(cell))
            self.fresh.add(cell)
            if self.missing(cell):
                raise JetExportError(f"{cell}: measured, and the database does not have it.")
        except JetExportError as e:
            self.fail(cell, e)
        if not self.keep:
            self.hands.discard(cell)

    def fail(self, cell: Cell, e: JetExportError) -> None:
        self.failed[cell] = str(e).replace("\n", " ")
        self.emit(f"  {self.failed[cell]}")

    def figures(self, cell: Cell) -> str:
        batch, context = self.cases[-1]
        have = self.entries(cell)
        decode, prefill = have[batch, context, "decode"], have[batch, context, "prefill"]
        at = f"B{batch} {context}"
        return f"decode {decode.median_ms:.4g} ms, prefill {prefill.median_ms:.4g} ms at {at}"

    def eta(self, left: int) -> str:
        return f"; about {left * self.spent / self.done:.0f} s left" if left > 0 and self.done else ""
