"""Where a command will write, checked before it measures or trains for an hour."""

from __future__ import annotations

import os
from pathlib import Path

from jet_export.errors import JetExportError


def check_directory(path: Path, option: str = "--output") -> None:
    """Raises JetExportError where no directory can be made at `path`. Makes nothing."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise JetExportError(f"{option} {path}: {there} is a file.", "Name a directory.")
    if not os.access(there, os.W_OK):
        raise JetExportError(f"{option} {path}: {there} may not be written to.", "Name another directory.")


def check_file(path: Path, option: str = "--output") -> None:
    """Raises JetExportError where no file can be written at `path`. Makes nothing."""
    if path.is_dir():
        raise JetExportError(f"{option} {path}: is a directory.", "Name a file.")
    check_directory(path.parent, option)
