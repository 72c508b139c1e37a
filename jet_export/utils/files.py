"""Files: checks of output paths, atomic writes, hashes, and the package's data."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from jet_export.utils.errors import JetExportError

DATA = Path(__file__).parents[1] / "data"  # shipped with the package


def existing(path: Path) -> Path:
    """`path`, or its nearest ancestor that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_directory(path: Path, option: str = "--output") -> None:
    """Raises JetExportError where no directory can be created at `path`. Creates nothing."""
    there = existing(path)
    if not there.is_dir():
        raise JetExportError(f"{option} {path}: {there} is a file.", "Name a directory.")
    if not os.access(there, os.W_OK):
        raise JetExportError(f"{option} {path}: {there} may not be written to.", "Name another directory.")


def check_file(path: Path, option: str = "--output") -> None:
    """Raises JetExportError where no file can be written at `path`. Creates nothing."""
    if path.is_dir():
        raise JetExportError(f"{option} {path}: is a directory.", "Name a file.")
    check_directory(path.parent, option)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8, entirely or not at all; directories are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)


def sha256_file(path: Path) -> str:
    """The hash of a file, read in large blocks: hashing them releases the GIL."""
    digest, buffer = hashlib.sha256(), bytearray(min(path.stat().st_size, 1 << 22) or 1)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(view[:n])
    return digest.hexdigest()


def replace_directory(tmp: Path, output: Path) -> None:
    """Move the finished directory to `output`; an old one there is removed only once the new one is in place."""
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
