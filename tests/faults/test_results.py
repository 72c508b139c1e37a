"""Results, logs and checkpoints: killed, and with a full disk, at every change; on a file system that is read-only."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.crashes import files, full_at_every_change, killed_at_every_change, read_only
from helpers.whole import make_directory, whole_or_before

from jet_export.bench.report import _write_records
from jet_export.evaluation import report as evaluation
from jet_export.training.checkpoint import Checkpoints, Progress
from jet_export.training.distributed import Group
from jet_export.training.report import _cut
from jet_export.utils.environment import write_result
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically

LINES = '{"step": 1}\n{"step": 2}\n{"step"'
WRITERS: dict[str, Callable[[Path], object]] = {
    "result.json": lambda d: write_result(d / "result.json", {"a": 1}),
    "rows.csv": lambda d: _write_records(d / "rows.csv", [{"a": 1, "b": "x,y"}]),
    "eval.json": lambda d: evaluation.write_json(d / "eval.json", SimpleNamespace(), []),  # type: ignore[arg-type]
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jet_export.utils.environment.environment", dict)
    monkeypatch.setattr(evaluation, "to_dict", lambda e, command: {"value": 1})


@pytest.mark.parametrize("name", WRITERS)
def test_a_result(tmp_path: Path, name: str) -> None:
    whole_or_before(name, WRITERS[name], tmp_path, expected=OSError)


@pytest.mark.parametrize("name", [*WRITERS, "out"])
def test_an_output_that_is_read_only(tmp_path: Path, name: str) -> None:
    """The error is the system's, and what lies there stays as it is."""
    write = {**WRITERS, "out": make_directory}[name]
    write(tmp_path)
    before = files(tmp_path)
    read_only(lambda: write(tmp_path), OSError)
    assert files(tmp_path) == before


def test_the_log_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """A kill while the lines of steps that will be run again are cut off loses none of those that stay."""
    log = tmp_path / "log.jsonl"
    for _ in killed_at_every_change(lambda: _cut(log, 1) if log.exists() else log.write_text(LINES)):
        assert not log.exists() or log.read_text() in ("", LINES)
    log.write_text(LINES)
    for _ in killed_at_every_change(lambda: _cut(log, 1)):
        assert log.read_text() in (LINES, '{"step": 1}\n')


class Saved:
    """The checkpoints of one process, the last of which is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoints()

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory, Group(0, 1, torch.device("cpu"), None), 1, False)

    def begin(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.save(1)

    def save(self, step: int) -> None:
        self.checkpoints().save({"w": torch.full((4,), float(step))}, Progress(step=step))

    def step(self) -> int:
        """Of the last one, which is whole."""
        found, w = self.checkpoints(), torch.zeros(4)
        last = found.last()
        assert last is not None
        tensors: dict[str, Any] = {"w": w}
        found.load(last, tensors)
        assert tensors["w"].tolist() == [float(last.step)] * 4
        return last.step


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_retrofits_checkpoint(tmp_path: Path) -> None:
    saved = Saved(tmp_path / "checkpoints")
    saved.begin()
    steps = []
    for _ in killed_at_every_change(lambda: saved.save(2)):
        steps.append(saved.step())
        saved.begin()
    assert set(steps) == {1, 2} and saved.step() == 2
    saved.begin()
    for _ in full_at_every_change(lambda: saved.save(2), JetExportError):
        assert saved.step() in (1, 2)
        saved.begin()


def test_a_device_is_written_to(tmp_path: Path) -> None:
    """--json /dev/null replaces no device."""
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    write_atomically(device, "x")
    assert device.is_symlink() and device.is_char_device()
