"""Files: checks of output paths before any work, atomic writes, hashes, and where the package's data lies."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from jet_export.utils.errors import JetExportError

DATA = Path(__file__).parents[1] / "data"  # what the package ships


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


def sha256_file(path: Path) -> str:
    """In long pieces, during which other threads of Python run."""
    digest, buffer = hashlib.sha256(), bytearray(min(path.stat().st_size, 1 << 22) or 1)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(view[:n])
    return digest.hexdigest()


def replace_directory(tmp: Path, output: Path) -> None:
    """Put the finished bundle in place; the old one survives until the new one is there."""
    old = output.parent / f".{output.name}.{os.getpid()}.old"
    if output.exists():
        output.rename(old)
    try:
        tmp.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
