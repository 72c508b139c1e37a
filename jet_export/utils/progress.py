"""Progress of long work: named stages and their seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager


class Progress:
    """Stages with their seconds; `print` is given whole lines."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self.emit = emit
        self.start = time.monotonic()

    @contextmanager
    def stage(self, name: str):
        start = time.monotonic()
        self.emit(f"  {name} ...")
        yield
        self.emit(f"  {name}: {time.monotonic() - start:.1f} s")
