"""What a run shows and records: a bar or lines, log.jsonl, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically

LOG = "log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """A line of log.jsonl. All but the last three are the same in a run that was resumed."""

    step: int
    stage: str
    loss: float
    parts: dict[str, float]
    lr: float
    grad_norm: float
    tokens: int  # so far
    tokens_per_s: float
    mfu: float | None
    seconds: float


class Report:
    """Of the first process; the others' (`directory` None) shows and writes nothing."""

    def __init__(
        self,
        directory: Path | None,
        emit: Callable[[str], None],
        *,
        done: int = 0,
        total: int = 0,
        every: int = 10,
        tensorboard: bool = True,
        bars: bool | None = None,
    ) -> None:
        """`done`: steps of the checkpoint that the run goes on from; what the log has beyond it is taken out."""
        self.directory, self.emit, self.total, self.every = directory, emit, total, every
        self.bars = directory is not None and (sys.stderr.isatty() if bars is None else bars)
        self._bar: Progress | None = None
        self._writer: Any = None
        if directory is not None:
            _cut(directory / LOG, done)
            self._log = (directory / LOG).open("a", encoding="utf-8")
            self._writer = _tensorboard(directory, done) if tensorboard else None

    def say(self, line: str) -> None:
        if self.directory is not None:
            self.emit(line)

    @contextmanager
    def stage(self, name: str, done: int, steps: int) -> Iterator[None]:
        """Shows the steps of a stage while it runs."""
        self.say(f"stage {name}: {steps:,} steps" + (f", from step {done:,}" if done else ""))
        self._began, self._done, self._steps = time.monotonic(), done, steps
        if not self.bars:
            yield
            return
        words = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
        console = Console(file=sys.stderr, force_terminal=True)
        columns = *words, TextColumn("{task.fields[said]}"), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as self._bar:
            self._task = self._bar.add_task(name, total=steps, completed=done, said="")
            yield
        self._bar = None

    def step(self, record: StepRecord, stage_step: int) -> None:
        """`stage_step`: steps of the stage that are done."""
        if self.directory is None:
            return
        try:
            self._log.write(json.dumps(asdict(record)) + "\n")
            self._log.flush()
        except OSError as e:
            raise JetExportError(
                f"{self.directory / LOG} cannot be written ({e.strerror}). The checkpoints are kept.",
                "Free some space and go on with --resume.",
            ) from None
        if self._writer is not None:
            values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm, **record.parts}
            for name, value in {**values, "tokens_per_s": record.tokens_per_s}.items():
                self._writer.add_scalar(f"{record.stage}/{name}", value, record.step)
        said = describe(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=stage_step, said=said)
            if stage_step == self._steps:
                self.emit(f"  step {stage_step:,}: {said}")
        elif stage_step % self.every == 0 or stage_step in (1, self._steps):
            per_step = (time.monotonic() - self._began) / max(1, stage_step - self._done)
            left = duration(per_step * (self._steps - stage_step))
            self.emit(f"  step {stage_step:,}/{self._steps:,}: {said}, {left} left")

    def close(self) -> None:
        if self.directory is not None:
            self._log.close()
        if self._writer is not None:
            self._writer.close()


def describe(r: StepRecord) -> str:
    parts = [f"{name} {value:.4f}" for name, value in r.parts.items() if not name.startswith("layer_")]
    speed = f"{r.tokens_per_s:,.0f} tokens/s" + (f", MFU {r.mfu:.0%}" if r.mfu is not None else "")
    return ", ".join([f"loss {r.loss:.4f}", *(parts if len(parts) > 1 else []), f"lr {r.lr:.1e}", speed])


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _cut(log: Path, done: int) -> None:
    """Leave the lines of the first `done` steps: the rest will be run again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        write_atomically(log, "".join(f"{line}\n" for line in lines if _step(line) <= done))


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return float("inf")


def _tensorboard(directory: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)
