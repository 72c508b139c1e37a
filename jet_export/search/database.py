"""Measurements, kept in SQLite (WAL): shared by searches, and never lost once written.

A row is one number of one cell: its key names the machine, the versions, the kernels, the engine and the case.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jet_export.search.cells import Cell
from jet_export.utils.errors import JetExportError

SCHEMA = 1
TABLES = """
create table if not exists measurements (
    id text primary key,           -- sha256 of identity
    identity text not null,        -- JSON: machine, engine and case
    kind text not null, label text not null,
    batch integer not null, context integer not null, phase text not null,
    median_ms real not null, p90_ms real not null,
    details text not null,         -- JSON: how the states were filled, samples, seconds
    measured_at text not null default current_timestamp
) strict
"""
PHASES = ("decode", "prefill")
AGREE = 0.1  # how far the two quickest repeats of a case may be apart


@dataclass(frozen=True)
class Entry:
    """One number: a decode step's milliseconds, or those of the whole context's prefill, of the whole batch."""

    batch: int
    context: int
    phase: str
    median_ms: float
    p90_ms: float
    details: dict[str, Any]

    @property
    def confirmed(self) -> bool | None:
        """Whether its two quickest repeats agree; None where it has no two."""
        every = sorted(self.details.get("every_ms", ()))
        return every[1] <= (1 + AGREE) * every[0] if len(every) > 1 else None

    def with_repeats(self, other: Entry | None) -> Entry:
        """The quicker of both, with the repeats of both: what else a machine does only adds time."""
        if other is None:
            return self
        quicker = min(self, other, key=lambda e: e.median_ms)
        every = [ms for e in (other, self) for ms in e.details.get("every_ms", ())]
        return replace(quicker, details={**quicker.details, "every_ms": every})


@dataclass(frozen=True)
class Bench:
    """Where and how cells are timed: all of an identity but the cell and the case."""

    machine: dict[str, Any]
    backend: str
    dtype: str
    chunk: int
    new_tokens: int
    repeats: int
    fill: str

    def identity(self, cell: Cell, batch: int, context: int, phase: str) -> str:
        case = {"batch": batch, "context": context, "phase": phase}
        return json.dumps({**self.__dict__, "cell": cell.describe(), **case}, sort_keys=True)


@cache
def kernel_hash() -> str:
    """Of this package's sources and the kernels' configurations, which make an engine fast or slow."""
    from jet_export.bench.verified import source_digest

    return source_digest()[:16]


def machine(device: torch.device) -> dict[str, Any]:
    """What a latency depends on besides the engine: device, driver, versions, kernels; on a CPU its threads too."""
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "kernels": kernel_hash()}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
        return {"device": torch.cuda.get_device_name(device), "driver": driver, "cuda": torch.version.cuda, **found}
    return {"device": cpu_name(), "threads": torch.get_num_threads(), **found}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


class Database:
    """One file, which several processes and threads may use."""

    def __init__(self, path: Path) -> None:
        """Create it, or check an existing one. Raises JetExportError where it is damaged or no such database."""
        self.path = path
        self.local = threading.local()
        with self.guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.connection() as db:
                db.execute("pragma journal_mode=wal")
                version = db.execute("pragma user_version").fetchone()[0]
                if version not in (0, SCHEMA):
                    raise JetExportError(
                        f"{path}: made by another jet-export (schema {version}, this one reads {SCHEMA}).",
                        "Pass another --database FILE.",
                    )
                found = db.execute("pragma quick_check(1)").fetchone()[0]
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
                db.execute(TABLES)
                db.execute(f"pragma user_version={SCHEMA}")
                db.execute("select id, identity, median_ms from measurements limit 1")

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, in a transaction. A commit survives the process, however it ends."""
        if not hasattr(self.local, "db"):
            self.local.db = sqlite3.connect(self.path, timeout=60)
            self.local.db.execute("pragma synchronous=normal")
        with self.local.db:
            yield self.local.db

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """One message for all that SQLite finds wrong."""
        try:
            yield
        except (sqlite3.Error, OSError) as e:
            raise JetExportError(
                f"{self.path}: not a usable measurement database ({' '.join(str(e).split())}).",
                f"It only saves measuring again: move it away (mv {self.path} {self.path}.bad), or pass another "
                "--database FILE.",
            ) from None

    def get(self, bench: Bench, cell: Cell, batch: int, context: int) -> dict[str, Entry]:
        """What is known of a case, by phase."""
        out: dict[str, Entry] = {}
        with self.guarded(), self.connection() as db:
            for phase in PHASES:
                identity = bench.identity(cell, batch, context, phase)
                row = db.execute(
                    "select median_ms, p90_ms, details from measurements where id = ?", (digest_of(identity),)
                ).fetchone()
                if row:
                    out[phase] = Entry(batch, context, phase, row[0], row[1], json.loads(row[2]))
        return out

    def put(self, bench: Bench, cell: Cell, entries: list[Entry]) -> None:
        """Write one case's numbers, in one transaction."""
        rows = []
        for e in entries:
            identity = bench.identity(cell, e.batch, e.context, e.phase)
            rows.append((digest_of(identity), identity, cell.kind, str(cell), e.batch, e.context, e.phase,
                         e.median_ms, e.p90_ms, json.dumps(e.details)))  # fmt: skip
        columns = "id, identity, kind, label, batch, context, phase, median_ms, p90_ms, details"
        with self.guarded(), self.connection() as db:
            marks = ", ".join("?" * 10)
            db.executemany(f"insert or replace into measurements ({columns}) values ({marks})", rows)

    def count(self) -> int:
        with self.guarded(), self.connection() as db:
            return int(db.execute("select count(*) from measurements").fetchone()[0])


def digest_of(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()
