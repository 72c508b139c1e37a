"""Whoever writes may be killed at any moment, and find the disk full at any: under the name that was given lies what
was there before or what is new, whole; and where the process lives on, nothing else is left."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.crashes import files, full_at_every_change
from helpers.eager_bundle import eager_llm, write_mini_config
from helpers.whole import make_directory, whole_or_before

from jet_export.build import build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest, check_files
from jet_export.cli import app as cli
from jet_export.utils import files as utils
from jet_export.utils.errors import IO_FAILED, JetExportError
from jet_export.utils.files import remove_leftovers, write_atomically


def test_a_file(tmp_path: Path) -> None:
    whole_or_before("a.json", lambda d: write_atomically(d / "a.json", "new"), tmp_path, expected=OSError)


def test_a_directory(tmp_path: Path) -> None:
    whole_or_before("out", make_directory, tmp_path, expected=OSError)


def test_a_directory_where_two_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: killed between two renames, the old one has another name; a full disk brings it back."""
    monkeypatch.setattr(utils, "_exchange", lambda a, b: False)
    make_directory(tmp_path)
    (tmp_path / "out/a").write_text("old")
    before = files(tmp_path)
    for _ in full_at_every_change(lambda: make_directory(tmp_path), OSError):
        assert files(tmp_path) in (before, {"out/a": b"new a", "out/b": b"new b"})
        (tmp_path / "out/a").write_text("old")


def test_a_session(tmp_path: Path) -> None:
    llm = eager_llm(Limits(max_batch_size=1, max_seq_len=64, prefill_chunk=32))
    session = llm.session([1, 2, 3])

    def save(directory: Path) -> None:
        llm.save_session(session, directory / "s.session")

    whole_or_before("s.session", save, tmp_path, expected=JetExportError, kind=len)  # its header has no fixed order


def test_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the packages, whose compilation is tested by itself."""
    config, output = write_mini_config(tmp_path), tmp_path / "made"
    output.mkdir()

    def packages(plan: object, manifest: object, model: object, directory: Path, progress: object) -> None:
        for name in ("prefill.pt2", "decode.pt2"):
            (directory / name).write_text(name)

    class Now:
        @staticmethod
        def now(zone: object) -> "Now":
            return Now()

        def isoformat(self, timespec: str) -> str:
            return "2026-01-01"

    monkeypatch.setattr(build, "write_packages", packages)
    monkeypatch.setattr(build, "datetime", Now)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    options = BuildOptions(
        model=str(config), device="cpu", dtype="float32", random_weights=True, force=True, output=output / "bundle",
        max_batch_size=1, max_seq_len=64,
    )  # fmt: skip
    plan = make_plan(options)

    def make(directory: Path) -> None:
        build.run_build(plan, ["jet-export", "build"], lambda line: None)

    whole_or_before("bundle", make, output, expected=OSError)
    check_files(output / "bundle", Manifest.load(output / "bundle"))


def test_leftovers_of_killed_builds_are_removed_a_day_later(tmp_path: Path) -> None:
    dead, new, alive, other = (tmp_path / f".out.{pid}.tmp" for pid in (2**22 + 1, 2**22 + 2, os.getpid(), "x"))
    for path in (dead, new, alive, other):
        path.mkdir()
        if path != new:
            os.utime(path, (0, 0))
    remove_leftovers(tmp_path / "out")
    assert not dead.exists() and new.exists() and alive.exists() and other.exists()


@pytest.mark.parametrize(
    ("e", "status", "said"),
    [
        (OSError(28, "No space left on device", "/x/y"), IO_FAILED, "error: /x/y: No space left on device."),
        (OSError(30, "Read-only file system", "/x/y"), IO_FAILED, "error: /x/y: Read-only file system."),
        (RuntimeError("I/O error: No space left on device (os error 28)"), IO_FAILED, "error: I/O error: No space"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried."), 2, "error: CUDA out of memory. Tried."),
    ],
)
def test_the_command_line_says_what_failed(monkeypatch, capsys, e: Exception, status: int, said: str) -> None:
    def app() -> None:
        raise e

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status and capsys.readouterr().err.startswith(said)


def test_other_errors_keep_their_traceback(monkeypatch) -> None:
    def app() -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(ConnectionResetError):
        cli.main()
    assert sys.exc_info() == (None, None, None)
