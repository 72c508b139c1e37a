"""Progress of long work: bars with the time left in a terminal, plain lines elsewhere.

with Progress(emit).stage("measure", total=len(cases)) as stage:
    for case in cases:
        ...
        stage.advance()
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from jet_export.utils.console import human

EVERY = 30.0  # seconds between two lines of a stage

Emit = Callable[[str], None]
Clock = Callable[[], float]


class Progress:
    """Work in named stages. `emit`: takes the lines. `bars`: None draws them where stderr is a terminal."""

    def __init__(self, emit: Emit, bars: bool | None = None, clock: Clock = time.monotonic) -> None:
        self.emit, self.clock = emit, clock
        self.bars = sys.stderr.isatty() if bars is None else bars

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, *, expected: float | None = None, lines: bool = True
    ) -> Iterator[Stage]:
        """A stage of `total` parts, or one that takes about `expected` seconds, or neither. Without bars, a line when
        it begins, one now and then that says how long is left, and one with its seconds when it ends; none without
        `lines`, for work that has lines of its own."""
        stage = Stage(self, name, total, lines)
        if not self.bars:
            if lines:
                self.emit(f"  {name} ...")
            yield stage
        else:
            with _shown(name, total, expected) as stage.shown:
                yield stage
        if lines:
            self.emit(f"  {name}: {self.clock() - stage.began:.1f} s")


class Stage:
    """`shown`: draws how much is done."""

    shown: Callable[[int, int | None], None] | None = None

    def __init__(self, progress: Progress, name: str, total: int | None, lines: bool) -> None:
        self.progress, self.name, self.total, self.lines = progress, name, total, lines
        self.done = 0
        self.began = self.said = progress.clock()

    def advance(self, parts: int = 1) -> None:
        self.at(self.done + parts)

    def at(self, done: int, total: int | None = None) -> None:
        """`done` parts are done, of `total` if that is known only now."""
        self.done, self.total = done, self.total if total is None else total
        if self.shown:
            self.shown(self.done, self.total)
            return
        now = self.progress.clock()
        if self.lines and self.total and 0 < done < self.total and now - self.said >= EVERY:
            self.said = now
            left = (now - self.began) / done * (self.total - done)
            self.progress.emit(f"  {self.name}: {counts(done, self.total)}, {left:.0f} s left")


_display: Bars | None = None  # the one on the screen; a stage inside of another is a line of it


@contextmanager
def _shown(name: str, total: int | None, expected: float | None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar that goes when its stage ends."""
    global _display
    outer = _display
    if outer is None:
        # Lines that are printed meanwhile go above the bars, except where they go to a file.
        console = Console(file=sys.stderr, force_terminal=True)
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), Left()
        _display = Bars(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
        _display.start()
    bars = _display
    assert bars is not None
    task = bars.add_task(name, total=expected if total is None else total, expected=expected if total is None else None)

    def update(done: int, total: int | None) -> None:
        bars.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        bars.remove_task(task)
        if outer is None:
            bars.stop()
            _display = None


class Left(ProgressColumn):
    """Parts done and the time left, from the rate so far; of a stage with an expected time, which it also moves."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        elapsed, expected = task.elapsed or 0.0, task.fields.get("expected")
        if expected:
            task.completed = min(elapsed, 0.99 * expected)
            left = expected - elapsed
            return Text(f"about {clock(left)} left" if left > 0 else "longer than expected")
        if not task.total:
            return Text("")
        parts = counts(int(task.completed), int(task.total))
        if not 0 < task.completed < task.total:
            return Text(parts)
        return Text(f"{parts}, {clock(elapsed / task.completed * (task.total - task.completed))} left")


def counts(done: int, total: int) -> str:
    """Of bytes, which are many, in readable units."""
    return f"{done}/{total}" if total < 1_000_000 else f"{human(done)} of {human(total)}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def hub_bars(stage: Stage) -> type[Any]:
    """A tqdm class for huggingface_hub that draws nothing, and tells `stage` of the bytes that have come."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        first: Any = None  # that of the bytes: others count files, or the same bytes on their way

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})
            if Bar.first is None and self.unit == "B":
                Bar.first = self

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self is Bar.first:
                stage.at(int(self.n), int(self.total) if self.total else None)

    return Bar
