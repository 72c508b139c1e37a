"""The process that measures: one for many cells, and a fresh one after a cell that it fails at."""

import os
import signal
import sys
from pathlib import Path

import pytest
from helpers.eager_bundle import mini_config

from jet_export.search import work
from jet_export.search.cells import base_cell
from jet_export.search.database import Bench, Database
from jet_export.search.work import Measurer, Processes
from jet_export.utils.errors import JetExportError

WORKER = """
import json, os, sys
from jet_export.search import worker

def measure(task):
    print("a library talks")
    what = task["cases"]
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "hang":
        import time
        time.sleep(60)
    if what == "wrong":
        raise ValueError("no such number\\nsecond line")
    with open(task["bundle"] + ".pids", "a") as f:
        f.write(f"{os.getpid()}\\n")

worker.measure = measure
worker.main()
"""


@pytest.fixture
def hands(tmp_path, monkeypatch):
    """Real processes whose measurement is made up: the cases say what happens."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    executable = tmp_path / "python"  # called as: python -m jet_export.search.worker measure
    executable.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$3"\n')
    executable.chmod(0o755)
    monkeypatch.setattr(work.sys, "executable", str(executable))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    bench = Bench({"device": "none"}, "inductor", "float32", 64, 8, 1, "auto")
    found = Processes(Database(tmp_path / "m.db"), bench, "cpu", tmp_path / "bundles", 1, 128)
    found.home.mkdir(parents=True)
    yield found
    found.stop()


CELL = base_cell(mini_config())


def pids(hands: Processes) -> list[str]:
    return hands.bundle(CELL).with_suffix(".pids").read_text().split()


def test_cells_share_a_process_until_one_fails(hands) -> None:
    for _ in range(3):
        hands.measure(CELL, [])
    with pytest.raises(JetExportError, match=r"base: measure failed: ValueError: no such number$"):
        hands.measure(CELL, "wrong")
    hands.measure(CELL, [])
    with pytest.raises(JetExportError, match=r"base: measure failed: its process died of SIGKILL"):
        hands.measure(CELL, "die")
    hands.measure(CELL, [])
    first, *others = pids(hands)
    assert others[:2] == [first, first] and len({first, *others[2:]}) == 3


def test_a_process_killed_between_cells_is_replaced(hands) -> None:
    hands.measure(CELL, [])
    os.kill(int(pids(hands)[0]), signal.SIGKILL)
    assert hands.measurer is not None
    hands.measurer.process.wait()
    hands.measure(CELL, [])
    assert len(set(pids(hands))) == 2


def test_a_measurement_that_hangs_is_ended(hands, monkeypatch) -> None:
    monkeypatch.setattr(work, "LONGEST", 1.0)
    with pytest.raises(JetExportError, match=r"measure took over 1\.0 s"):
        hands.measure(CELL, "hang")
    assert hands.measurer is None


def test_stopping_ends_the_process(hands) -> None:
    hands.measure(CELL, [])
    measurer = hands.measurer
    assert isinstance(measurer, Measurer)
    hands.stop()
    assert not measurer.alive and hands.measurer is None
