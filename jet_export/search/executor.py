"""Subprocesses (worker.py) that build and measure cells.

Each build has a process of its own. Measurements share one, since starting it takes longer than most of them; after one
that fails, the next gets a new process.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

from jet_export.search.cells import Cell
from jet_export.search.database import Database, MeasurementSetup
from jet_export.utils.errors import JetExportError

TASK_TIMEOUT = 3600  # seconds of one build or measurement


class Executor(Protocol):
    """Builds and measures cells. `build` and `measure` raise JetExportError if they fail."""

    def built(self, cell: Cell) -> bool:
        """Whether the cell's bundle is there."""

    def build(self, cell: Cell) -> None: ...

    def measure(self, cell: Cell, cases: list[tuple[int, int]]) -> None:
        """Write the latencies at these (batch, context) to the database."""

    def discard(self, cell: Cell) -> None:
        """Remove the cell's bundle."""

    def stop(self) -> None:
        """End whatever is running."""


@dataclass
class MeasuringProcess:
    """A running `worker measure`: takes a task as a line of JSON, and answers each with a line."""

    process: subprocess.Popen[str]
    errors: IO[str]  # its standard error

    @classmethod
    def start(cls) -> MeasuringProcess:
        errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `end`)
        command = [sys.executable, "-m", "jet_export.search.worker", "measure"]
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True), errors)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, task: dict[str, Any], seconds: float) -> str | None:
        """The answer's line; "" if the process died, None if it was killed for taking longer than `seconds`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            self.process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return None if timed_out.is_set() else line

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            if file is not None:
                with suppress(BrokenPipeError):
                    file.close()


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
    builds: set[subprocess.Popen[str]] = field(default_factory=set)
    measuring_process: MeasuringProcess | None = None

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
        worker = self.measuring_process = self.measuring_process or MeasuringProcess.start()
        try:
            line = worker.ask({**self.common(cell), **task}, TASK_TIMEOUT)
            if line is None:
                raise JetExportError(f"{cell}: measure took over {TASK_TIMEOUT} s.")
            if json.loads(line or "null") != {}:
                code = 1 if line else worker.process.wait()
                raise JetExportError(f"{cell}: measure failed: {failure_reason(code, line, worker.stderr())}")
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
        command = [sys.executable, "-m", "jet_export.search.worker", "build"]
        pipe = subprocess.PIPE
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))  # Inductor's default is a thread a core, each build
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
            self.builds.add(process)
            try:
                out, err = process.communicate(json.dumps(task), timeout=TASK_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise JetExportError(f"{cell}: build took over {TASK_TIMEOUT} s.") from None
            except BaseException:
                process.kill()
                raise
            finally:
                self.builds.discard(process)
        if process.returncode:
            raise JetExportError(f"{cell}: build failed: {failure_reason(process.returncode, out, err)}")

    def stop(self) -> None:
        for process in list(self.builds):
            process.kill()
        self.end_measuring_process()


def failure_reason(returncode: int, out: str, err: str) -> str:
    """The error that a worker answered with, or how it died."""
    for line in reversed(out.splitlines()):
        try:
            return str(json.loads(line)["error"])
        except (ValueError, KeyError, TypeError):
            continue
    if returncode < 0:
        return f"its process died of {signal.Signals(-returncode).name}"
    return (err.strip().splitlines() or [f"exit status {returncode}"])[-1]
