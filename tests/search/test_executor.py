"""The measuring process: one for many cells, and a new one after a cell that fails."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.eager_bundle import mini_config

from jet_export.search import executor as executor_module
from jet_export.search.cells import base_cell
from jet_export.search.database import Database, MeasurementSetup
from jet_export.search.executor import SubprocessExecutor
from jet_export.search.processes import WorkerProcess
from jet_export.utils.errors import JetExportError

WORKER = """
import json, os, sys
from jet_export.search import worker

def measure(task):
    print("what a library prints")
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
def executor(tmp_path, monkeypatch) -> Iterator[SubprocessExecutor]:
    """Real processes that measure nothing: the cases say what they do instead."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    executable = tmp_path / "python"  # called as: python -m jet_export.search.worker measure
    executable.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$3"\n')
    executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    setup = MeasurementSetup(
        machine={"device": "none"}, backend="inductor", dtype="float32", chunk=64, new_tokens=8, repeats=1, fill="auto"
    )
    found = SubprocessExecutor(
        database=Database(tmp_path / "m.db"),
        setup=setup,
        device="cpu",
        directory=tmp_path / "bundles",
        max_batch_size=1,
        max_seq_len=128,
    )
    found.home.mkdir(parents=True)
    yield found
    found.stop()


CELL = base_cell(mini_config())


def pids(executor: SubprocessExecutor) -> list[str]:
    return executor.bundle(CELL).with_suffix(".pids").read_text().split()


def test_cells_share_a_process_until_one_fails(executor) -> None:
    for _ in range(3):
        executor.measure(CELL, [])
    with pytest.raises(JetExportError, match=r"base: measure failed: ValueError: no such number$"):
        executor.measure(CELL, "wrong")
    executor.measure(CELL, [])
    with pytest.raises(JetExportError, match=r"base: measure failed: its process died of SIGKILL"):
        executor.measure(CELL, "die")
    executor.measure(CELL, [])
    first, *others = pids(executor)
    assert others[:2] == [first, first] and len({first, *others[2:]}) == 3


def test_a_process_killed_between_cells_is_replaced(executor) -> None:
    executor.measure(CELL, [])
    os.kill(int(pids(executor)[0]), signal.SIGKILL)
    assert executor.measuring_process is not None
    executor.measuring_process.process.wait()
    executor.measure(CELL, [])
    assert len(set(pids(executor))) == 2


def test_a_measurement_that_hangs_is_ended(executor, monkeypatch) -> None:
    monkeypatch.setattr(executor_module, "TASK_TIMEOUT", 1.0)
    with pytest.raises(JetExportError, match=r"measure took over 1\.0 s"):
        executor.measure(CELL, "hang")
    assert executor.measuring_process is None


def test_stopping_ends_the_process(executor) -> None:
    executor.measure(CELL, [])
    process = executor.measuring_process
    assert isinstance(process, WorkerProcess)
    executor.stop()
    assert not process.alive and executor.measuring_process is None
