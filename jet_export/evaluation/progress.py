"""Progress of an evaluation: a stage for each kind of requests of each model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from jet_export.utils.progress import Progress, Stage


class EvaluationProgress:
    """Called with (what runs, requests that have ended, requests). `label`: whose requests they are."""

    def __init__(self, emit: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.progress, self.label = Progress(emit, clock=clock), ""
        self.stages = ExitStack()
        self.stage: Stage | None = None

    def __enter__(self) -> EvaluationProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, where: TracebackType | None) -> None:
        self.stages.__exit__(kind, e, where)

    def __call__(self, kind: str, done: int, total: int) -> None:
        if done == 0:
            self.stages.close()
            self.stage = self.stages.enter_context(self.progress.stage(f"{self.label}: {kind}", total))
        elif self.stage is not None:
            self.stage.at(done)
            if done == total:
                self.stages.close()
