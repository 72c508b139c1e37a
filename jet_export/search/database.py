"""Measurements, kept in SQLite (WAL): shared by searches, and never lost once written.

A row is one latency of one cell. Its key names the machine, the versions, the kernels, the engine, the batch, the
context and the phase.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
BUSY_S = 60.0  # how long one waits for another process that writes
TOLERANCE = 0.1  # relative distance of the two fastest repeats up to which they confirm each other

Metric = tuple[int, int, str]  # batch, context, phase
Latencies = dict[Metric, float]  # milliseconds


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One latency of a whole batch, in milliseconds: a decode step, or the prefill of the whole context."""

    batch: int
    context: int
    phase: str
    median_ms: float
    p90_ms: float
    details: dict[str, Any]

    @property
    def confirmed(self) -> bool | None:
        """Whether its two fastest repeats agree; None if it has fewer than two."""
        every = sorted(self.details.get("every_ms", ()))
        return every[1] <= (1 + TOLERANCE) * every[0] if len(every) > 1 else None

    def with_repeats(self, other: Entry | None) -> Entry:
        """The faster of both, with the repeats of both: other load on the machine only adds time."""
        if other is None:
            return self
        faster = min(self, other, key=lambda e: e.median_ms)
        every = [ms for e in (other, self) for ms in e.details.get("every_ms", ())]
        return replace(faster, details={**faster.details, "every_ms": every})


@dataclass(frozen=True, kw_only=True)
class MeasurementSetup:
    """Where and how cells are timed. The field names are part of the database's keys."""

    machine: dict[str, Any]  # see describe_machine
    backend: str
    dtype: str
    chunk: int  # tokens of a prefill call
    new_tokens: int
    repeats: int
    fill: str

    def identity(self, cell: Cell, batch: int, context: int, phase: str) -> str:
        metric = {"batch": batch, "context": context, "phase": phase}
        return json.dumps({**self.__dict__, "cell": cell.describe(), **metric}, sort_keys=True)


class Database:
    """One file, which several processes and threads may share."""

    def __init__(self, path: Path) -> None:
        """Create the file, or check an existing one. Raises JetExportError if it is damaged or no such database."""
        self.path = path
        self.local = threading.local()
        with self.guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.connection() as db:
                write_ahead(db)
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
        """This thread's connection, in a transaction, whose commit survives a kill of the process."""
        if not hasattr(self.local, "db"):
            self.local.db = sqlite3.connect(self.path, timeout=BUSY_S)
            self.local.db.execute("pragma synchronous=normal")
        with self.local.db:
            yield self.local.db

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turns every error of SQLite into one message."""
        try:
            yield
        except (sqlite3.Error, OSError) as e:
            raise JetExportError(
                f"{self.path}: not a usable measurement database ({' '.join(str(e).split())}).",
                f"It only saves measuring again: move it away (mv {self.path} {self.path}.bad), or pass another "
                "--database FILE.",
            ) from None

    def get(self, setup: MeasurementSetup, cell: Cell, batch: int, context: int) -> dict[str, Entry]:
        """The latencies known of a cell at this batch and context, by phase."""
        out: dict[str, Entry] = {}
        with self.guarded(), self.connection() as db:
            for phase in PHASES:
                identity = setup.identity(cell, batch, context, phase)
                row = db.execute(
                    "select median_ms, p90_ms, details from measurements where id = ?", (digest_of(identity),)
                ).fetchone()
                if row:
                    out[phase] = Entry(
                        batch=batch,
                        context=context,
                        phase=phase,
                        median_ms=row[0],
                        p90_ms=row[1],
                        details=json.loads(row[2]),
                    )
        return out

    def put(self, setup: MeasurementSetup, cell: Cell, entries: list[Entry]) -> None:
        """Write entries of a cell in one transaction."""
        rows = []
        for e in entries:
            identity = setup.identity(cell, e.batch, e.context, e.phase)
            key = (digest_of(identity), identity, cell.kind, str(cell), e.batch, e.context, e.phase)
            rows.append((*key, e.median_ms, e.p90_ms, json.dumps(e.details)))
        columns = "id, identity, kind, label, batch, context, phase, median_ms, p90_ms, details"
        marks = ", ".join("?" * 10)
        with self.guarded(), self.connection() as db:
            db.executemany(f"insert or replace into measurements ({columns}) values ({marks})", rows)

    def merge(self, setup: MeasurementSetup, cell: Cell, entries: list[Entry]) -> None:
        """Write entries of a cell, each with the repeats of the one that is there, as after --remeasure."""
        before = {(e.batch, e.context): self.get(setup, cell, e.batch, e.context) for e in entries}
        self.put(setup, cell, [e.with_repeats(before[e.batch, e.context].get(e.phase)) for e in entries])

    def count(self) -> int:
        with self.guarded(), self.connection() as db:
            return int(db.execute("select count(*) from measurements").fetchone()[0])


def write_ahead(db: sqlite3.Connection) -> None:
    """Set the journal mode. SQLite's own timeout does not hold here: of two that open a new file at once, one is told
    at once that it is locked."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("pragma journal_mode=wal")
            return
        except sqlite3.OperationalError as e:
            if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def digest_of(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()
