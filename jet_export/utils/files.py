"""Files: checks of output paths, atomic writes, hashes, and the package's data."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import shutil
import time
from pathlib import Path

from jet_export.utils.errors import JetExportError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)
LEFTOVER_AGE = 24 * 3600.0  # seconds
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
    """Write `text` as UTF-8, entirely or not at all; directories are created. A device (/dev/stdout) is written to."""
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        tmp.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise


def sha256_file(path: Path) -> str:
    """The hash of a file, read in large blocks: hashing them releases the GIL."""
    digest, buffer = hashlib.sha256(), bytearray(min(path.stat().st_size, 1 << 22) or 1)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(view[:n])
    return digest.hexdigest()


def replace_directory(tmp: Path, output: Path) -> None:
    """Move the finished directory to `output`; an old one there is removed only once the new one is in place, and at no
    moment is there none, where the file system can exchange two."""
    if not output.exists():
        tmp.rename(output)
        return
    if _exchange(tmp, output):
        shutil.rmtree(tmp, ignore_errors=True)
        return
    old = output.parent / f".{output.name}.{os.getpid()}.old"
    output.rename(old)
    try:
        tmp.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two directories in one step; False where that is not to be had (NFS, old kernels)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0)


def remove_leftovers(output: Path) -> None:
    """Remove the temporary directories beside `output` of processes that were killed while they wrote it, a day later:
    on a shared file system they may be another machine's."""
    for left in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and left.stat().st_mtime < time.time() - LEFTOVER_AGE:
            shutil.rmtree(left, ignore_errors=True)
