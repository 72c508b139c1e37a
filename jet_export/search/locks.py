"""File locks (flock), which the system releases however a process ends.

The machine's: builds share it, a measurement holds it alone, or only one of its GPUs, which excludes builds all the
same. A cell's: one search builds and measures it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

MOST_GPUS = 16  # of a machine


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


def gpu_lock(gpu: int) -> Path:
    """Of a measurement on this GPU alone."""
    return machine_lock().with_suffix(f".gpu{gpu % MOST_GPUS}")


@contextmanager
def building() -> Iterator[None]:
    """Excludes measurements, not other builds. A waiting measurement goes first, since it holds the gate."""
    with ExitStack() as stack:
        with held(gate_lock(), exclusive=True):
            for lock in (machine_lock(), *map(gpu_lock, range(MOST_GPUS))):
                stack.enter_context(held(lock, exclusive=False))
        yield


@contextmanager
def measuring(on_wait: Callable[[], None] | None = None, gpu: int | None = None) -> Iterator[None]:
    """Excludes everything else, or with `gpu` everything but measurements on other GPUs: running builds end first, no
    new one begins. `on_wait` is called at most once."""
    notified = False

    def notify() -> None:
        nonlocal notified
        if on_wait is not None and not notified:
            on_wait()
        notified = True

    with ExitStack() as stack:
        with held(gate_lock(), exclusive=True, on_wait=notify):
            stack.enter_context(held(machine_lock(), exclusive=gpu is None, on_wait=notify))
            if gpu is not None:
                stack.enter_context(held(gpu_lock(gpu), exclusive=True, on_wait=notify))
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
