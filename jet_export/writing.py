"""Where a command will write, checked before it works for an hour; and files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from jet_export.errors import JetExportError


def existing(path: Path) -> Path:
    """`path`, or of the directories that it would be made in the nearest that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_directory(path: Path, option: str = "--output") -> None:
    """Raises JetExportError where no directory can be made at `path`. Makes nothing."""
    there = existing(path)
    if not there.is_dir():
        raise JetExportError(f"{option} {path}: {there} is a file.", "Name a directory.")
    if not os.access(there, os.W_OK):
        raise JetExportError(f"{option} {path}: {there} may not be written to.", "Name another directory.")


def check_file(path: Path, option: str = "--output") -> None:
    """Raises JetExportError where no file can be written at `path`. Makes nothing."""
    if path.is_dir():
        raise JetExportError(f"{option} {path}: is a directory.", "Name a file.")
    check_directory(path.parent, option)


def write_atomically(path: Path, text: str) -> None:
    """`text` as UTF-8, all of it or nothing; the directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)
