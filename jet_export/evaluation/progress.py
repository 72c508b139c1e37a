"""Progress of an evaluation: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between two lines


class EvaluationProgress:
    """Called with (what runs, requests that have ended, requests). `label`: whose requests they are."""

    def __init__(self, emit: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.emit, self.clock, self.label = emit, clock, ""
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.said = self.began = 0.0
        if sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> EvaluationProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, where: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, kind: str, done: int, total: int) -> None:
        text = f"{self.label}: {kind}"
        if self.bar:
            if done == 0:
                self.task = self.bar.add_task(text, total=total)
            elif self.task is not None:
                self.bar.update(self.task, completed=done)
            return
        now = self.clock()
        if done == 0:
            self.said = self.began = now
            self.emit(f"  {text}, {total} requests ...")
        elif done == total:
            self.emit(f"  {text}: {now - self.began:.1f} s")
        elif now - self.said >= EVERY:
            self.said = now
            left = (now - self.began) / done * (total - done)
            self.emit(f"  {text}: {done}/{total}, {left:.0f} s left")
