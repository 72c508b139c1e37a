"""File locks (flock), which the system releases however a process ends.

The machine's: builds share it, a measurement holds it alone. A cell's: one search builds and measures it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def machine_lock() -> Path:
    """Shared by all searches of a user on this machine, whatever their databases."""
    return Path(tempfile.gettempdir()) / f"jet-export-search-{os.getuid()}.lock"


def gate_lock() -> Path:
    """Held while waiting for the machine."""
    return machine_lock().with_suffix(".gate")


@contextmanager
def held(path: Path, *, exclusive: bool, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Wait for the lock and hold it inside the block. `on_wait` is called if it is not free at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with path.open("a") as f:
        try:
            fcntl.flock(f, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(f, kind)
        yield


@contextmanager
def building() -> Iterator[None]:
    """Excludes measurements, not other builds. A waiting measurement goes first, since it holds the gate."""
    with held(gate_lock(), exclusive=True):
        shared = held(machine_lock(), exclusive=False)
        shared.__enter__()
    try:
        yield
    finally:
        shared.__exit__(None, None, None)


@contextmanager
def measuring(on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Excludes everything else: running builds end first, no new one begins. `on_wait` is called at most once."""
    notified = False

    def notify() -> None:
        nonlocal notified
        if on_wait is not None and not notified:
            on_wait()
        notified = True

    with (
        held(gate_lock(), exclusive=True, on_wait=notify),
        held(machine_lock(), exclusive=True, on_wait=notify),
    ):
        yield


class Claim:
    """The lock of a cell: its holder builds and measures it."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """None if another search holds it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return cls(file)

    def release(self) -> None:
        self.file.close()
