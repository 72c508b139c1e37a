"""Locks on files, which the system frees however a process ends (flock).

The machine: builds share it, a measurement has it alone. A cell: one search builds and measures it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def machine_lock() -> Path:
    """One for all searches of a user on this machine, whatever their databases."""
    return Path(tempfile.gettempdir()) / f"jet-export-search-{os.getuid()}.lock"


@contextmanager
def held(path: Path, alone: bool, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Wait for the lock, hold it inside the block. `waiting` is called where it is not free at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with path.open("a") as f:
        try:
            fcntl.flock(f, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(f, kind)
        yield


@contextmanager
def building() -> Iterator[None]:
    """Together with other builds, with no measurement. Those that wait to measure go first: they hold the gate."""
    gate = machine_lock().with_suffix(".gate")
    with held(gate, alone=True):
        shared = held(machine_lock(), alone=False)
        shared.__enter__()
    try:
        yield
    finally:
        shared.__exit__(None, None, None)


@contextmanager
def measuring(waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Alone: waits for the builds that run, and lets no other begin. `waiting` is called once at most."""
    told = False

    def tell() -> None:
        nonlocal told
        if waiting is not None and not told:
            waiting()
        told = True

    with held(machine_lock().with_suffix(".gate"), True, tell), held(machine_lock(), True, tell):
        yield


class Claim:
    """A cell that this search works on. `take` returns None where another search does."""

    def __init__(self, file) -> None:
        self.file = file

    @classmethod
    def take(cls, path: Path) -> Claim | None:
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
