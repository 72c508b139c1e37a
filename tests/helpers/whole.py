"""What whoever writes owes: killed at any moment, and with a full disk at any, what was there before or what is new."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from helpers.crashes import files, full_at_every_change, killed_at_every_change
from jet_export.utils.files import replace_directory


def whole_or_before(
    name: str,
    new: Callable[[Path], object],
    directory: Path,
    *,
    expected: type[Exception],
    kind: Callable[[bytes], object] = bytes,  # what two runs have in common
) -> None:
    """`new(directory)` replaces `directory / name` (a file or a directory)."""

    def look() -> dict[str, object]:
        return {path: kind(data) for path, data in files(directory).items()}

    new(directory)
    after = look()
    assert after and all(path.split("/")[0] == name for path in after)
    for old in ({}, dict.fromkeys(after, b"old")):
        before = {path: kind(data) for path, data in old.items()}

        def begin(old: dict[str, bytes] = old) -> None:
            for there in sorted(directory.rglob("*"), reverse=True):
                there.rmdir() if there.is_dir() else there.unlink()
            for path, data in old.items():
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                (directory / path).write_bytes(data)

        begin()
        kills = 0
        for number in killed_at_every_change(lambda: new(directory)):
            found = {path: data for path, data in look().items() if path.split("/")[0] == name}
            assert found in (before, after), f"killed at change {number}"
            begin()
            kills += 1
        assert kills and look() == after
        begin()
        for number in full_at_every_change(lambda: new(directory), expected):
            assert look() in (before, after), f"disk full at change {number}"
            assert {p.name for p in directory.iterdir()} <= {name}, "something is left"
            begin()


def make_directory(directory: Path) -> None:
    tmp = directory / ".out.tmp"
    try:
        tmp.mkdir()
        (tmp / "a").write_text("new a")
        (tmp / "b").write_text("new b")
        replace_directory(tmp, directory / "out")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
