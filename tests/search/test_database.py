"""The database and the locks: nothing is lost, nothing is mixed up, damage is reported."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.eager_bundle import mini_config

from jet_export.search import locks
from jet_export.search.cells import Cell, base_cell
from jet_export.search.database import Database, Entry, MeasurementSetup
from jet_export.search.machine import describe_machine, kernel_hash
from jet_export.utils.errors import JetExportError

SETUP = MeasurementSetup(
    machine={"device": "some", "driver": "1", "kernels": "abc"},
    backend="inductor",
    dtype="bfloat16",
    chunk=64,
    new_tokens=16,
    repeats=3,
    fill="auto",
)


def entries(ms: float, batch: int = 1, context: int = 128) -> list[Entry]:
    return [
        Entry(batch=batch, context=context, phase=phase, median_ms=ms, p90_ms=2 * ms, details={"filled_by": "prefill"})
        for phase in ("decode", "prefill")
    ]


def test_another_kernel_configuration_is_another_machine(tmp_path, monkeypatch) -> None:
    from jet_export import kernels

    copy = tmp_path / "kernels"
    shutil.copytree(next(iter(kernels.__path__)), copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(kernels, "__path__", [str(copy)])
    monkeypatch.setattr(kernels, "__file__", str(copy / "__init__.py"))
    configs = copy / "configs.json"
    before = kernel_hash.__wrapped__()
    configs.write_text(configs.read_text() + "\n")
    assert kernel_hash.__wrapped__() != before


def test_entries_are_found_after_reopening(tmp_path) -> None:
    cell = base_cell(mini_config())
    Database(tmp_path / "m.db").put(SETUP, cell, entries(1.5))
    again = Database(tmp_path / "m.db").get(SETUP, cell, 1, 128)
    assert {p: e.median_ms for p, e in again.items()} == {"decode": 1.5, "prefill": 1.5}
    assert again["decode"].details == {"filled_by": "prefill"}
    with sqlite3.connect(tmp_path / "m.db") as db:
        assert db.execute("pragma journal_mode").fetchone() == ("wal",)


CELL = base_cell(mini_config())
OTHERS: list[tuple[MeasurementSetup, Cell, int, int]] = [
    (replace(SETUP, machine={**SETUP.machine, "device": "other"}), CELL, 1, 128),
    (replace(SETUP, machine={**SETUP.machine, "driver": "2"}), CELL, 1, 128),
    (replace(SETUP, machine={**SETUP.machine, "kernels": "abd"}), CELL, 1, 128),
    (replace(SETUP, backend="tensorrt"), CELL, 1, 128),
    (replace(SETUP, dtype="float32"), CELL, 1, 128),
    (replace(SETUP, chunk=32), CELL, 1, 128),
    (SETUP, replace(CELL, fp8=True), 1, 128),
    (SETUP, replace(CELL, state_dtype="bfloat16"), 1, 128),
    (SETUP, replace(CELL, config=replace(CELL.config, hidden_size=2 * CELL.config.hidden_size)), 1, 128),
    (SETUP, CELL, 2, 128),
    (SETUP, CELL, 1, 256),
]


@pytest.mark.parametrize("n", range(len(OTHERS)))
def test_another_machine_engine_or_case_is_another_entry(tmp_path, n: int) -> None:
    database = Database(tmp_path / "m.db")
    database.put(SETUP, CELL, entries(1.0))
    setup, cell, batch, context = OTHERS[n]
    assert database.get(setup, cell, batch, context) == {}


def test_this_machine_is_described() -> None:
    import torch

    found = describe_machine(torch.device("cpu"))
    assert found["device"] and found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__ and found["kernels"] == kernel_hash()


@pytest.mark.parametrize("damage", ["text", "truncated", "middle", "end", "foreign", "directory"])
def test_a_damaged_database_is_one_message(tmp_path, damage: str) -> None:
    path = tmp_path / "m.db"
    if damage == "text":
        path.write_text("not a database, but longer than the header that SQLite looks at " * 9)
    elif damage == "directory":
        path.mkdir()
    elif damage == "foreign":
        with sqlite3.connect(path) as db:
            db.execute("create table measurements (a)")
    else:
        database = Database(path)
        for i in range(64):
            database.put(SETUP, CELL, entries(1.0, batch=i + 1))
        database.local.db.execute("pragma wal_checkpoint(truncate)")
        database.local.db.close()
        content = bytearray(path.read_bytes())
        content = content[: len(content) // 2] if damage == "truncated" else content
        where = slice(len(content) - 4096, len(content)) if damage == "end" else slice(4096, 4096 + 2048)
        content[where] = b"\xff" * len(content[where])
        path.write_bytes(content)
    with pytest.raises(
        JetExportError, match=r"m\.db: not a usable measurement database \(.*\)\.\n.*mv .*--database FILE"
    ):
        Database(path).get(SETUP, CELL, 1, 128)


def test_another_schema_is_refused(tmp_path) -> None:
    with sqlite3.connect(tmp_path / "m.db") as db:
        db.execute("pragma user_version=7")
    with pytest.raises(JetExportError, match="schema 7, this one reads 1"):
        Database(tmp_path / "m.db")


def test_a_new_file_that_another_one_sets_up_is_waited_for(tmp_path) -> None:
    path = tmp_path / "m.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("begin immediate")  # as a journal mode being set: SQLite's timeout does not hold then
    release = threading.Timer(0.3, other.execute, ["commit"])
    release.start()
    assert Database(path).count() == 0
    release.join()


def write_forever(path: Path, first: int) -> None:
    database = Database(path)
    for i in range(first, first + 10**6):
        database.put(SETUP, CELL, entries(float(i), batch=i))
        Path(f"{path}.{first}").write_text(str(i))


def test_killed_writers_lose_nothing_they_wrote(tmp_path) -> None:
    path = tmp_path / "m.db"
    Database(path)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_forever, args=(path, first)) for first in (1, 10**7)]
    for w in writers:
        w.start()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not all(Path(f"{path}.{n}").exists() for n in (1, 10**7)):
        time.sleep(0.05)
    time.sleep(0.3)
    for w in writers:
        assert w.pid is not None
        os.kill(w.pid, signal.SIGKILL)
        w.join()
    database = Database(path)
    for first in (1, 10**7):
        last = int(Path(f"{path}.{first}").read_text() or first)
        assert last >= first
        for i in (first, last):
            assert database.get(SETUP, CELL, i, 128)["decode"].median_ms == i


def test_builds_run_together_and_measurements_alone() -> None:
    inside: list[str] = []
    seen: list[tuple[str, ...]] = []
    guard = threading.Lock()

    def work(kind: str) -> None:
        with locks.building() if kind == "build" else locks.measuring():
            with guard:
                inside.append(kind)
                seen.append(tuple(inside))
            time.sleep(0.02)
            with guard:
                inside.remove(kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ["build"] * 6 + ["measure"] * 4 + ["build"] * 4]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert len(seen) == 14
    assert all(now == ("measure",) for now in seen if "measure" in now)
    assert max(map(len, seen)) > 1


@pytest.mark.parametrize("busy", [locks.measuring, locks.building])
def test_waiting_to_measure_is_announced_once(busy) -> None:
    announced: list[str] = []
    waits, done = threading.Event(), threading.Event()

    def on_wait() -> None:
        announced.append("waits")
        waits.set()

    def measure() -> None:
        with locks.measuring(on_wait):
            done.set()

    other = threading.Thread(target=measure)
    with busy():
        other.start()
        assert waits.wait(10)
        assert not done.is_set()
    other.join(10)
    assert done.is_set() and announced == ["waits"]


def test_not_waiting_is_not_announced() -> None:
    with locks.measuring(pytest.fail):
        pass


def test_a_claim_has_one_holder(tmp_path) -> None:
    first = locks.Claim.take(tmp_path / "c.lock")
    assert first is not None
    assert locks.Claim.take(tmp_path / "c.lock") is None
    first.release()
    assert locks.Claim.take(tmp_path / "c.lock") is not None
