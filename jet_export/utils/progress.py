"""Progress of long work, in named stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Emits a line when a stage begins, and one with its seconds when it ends."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self.emit = emit
        self.start = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        self.emit(f"  {name} ...")
        yield
        self.emit(f"  {name}: {time.monotonic() - start:.1f} s")
