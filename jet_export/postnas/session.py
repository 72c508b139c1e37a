"""What the steps of a run share: the processes, the recipe, the teacher and the tasks; and training to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from jet_export.model.config import JetNemotronConfig
from jet_export.model.weights import CheckpointFiles
from jet_export.postnas.evaluate import Readout, Scores, score
from jet_export.postnas.recipe import PostnasRecipe
from jet_export.postnas.tasks import Task, load_task
from jet_export.training.checkpoint import Checkpoints, Progress
from jet_export.training.data.shard import Encode
from jet_export.training.data.tokenizer import load_encoder
from jet_export.training.distributed import Group
from jet_export.training.model import TrainingModel
from jet_export.training.report import LOG, Report
from jet_export.training.run import Retrofit
from jet_export.training.stop import Stop
from jet_export.training.student import load_teacher, open_teacher
from jet_export.training.trainer import Setting, saved_parameters
from jet_export.utils.errors import JetExportError

A = TypeVar("A")
B = TypeVar("B")
MODELS = "checkpoints"


class Stopped(Exception):
    """A stop was asked for, and what was being trained has its checkpoint."""


@dataclass(frozen=True)
class Job:
    """`work` leaves its result at `path`, as JSON."""

    path: Path
    work: Callable[[Session], object]  # pickled, for `parallel.Workers`


class Runner(Protocol):
    """`parallel.Workers`."""

    def run(self, session: Session, jobs: Sequence[Job]) -> None: ...


@dataclass
class Session:
    """`output`: of the whole run. `directory`: of the step that runs, which is not yet whole."""

    recipe: PostnasRecipe
    group: Group
    output: Path
    directory: Path
    device: str
    stop: Stop
    say: Callable[[str], None]  # does nothing but in the first process
    bars: bool | None = None  # of progress; None: in a terminal
    workers: Runner | None = None  # None: jobs one after the other

    def __getstate__(self) -> dict[str, Any]:
        """Without what each process has to itself."""
        own = ("group", "stop", "say", "bars", "workers")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}

    @cached_property
    def files(self) -> CheckpointFiles:
        return open_teacher(self.recipe.training.teacher)

    @property
    def config(self) -> JetNemotronConfig:
        """The teacher's."""
        return self.files.config

    @cached_property
    def encode(self) -> Encode:
        """One for all candidates, which read the same texts."""
        named = self.recipe.data.tokenizer
        return load_encoder(Path(named) if named else self.files.directory, self.config)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        ends, length = self.config.eos_token_id >= 0, self.recipe.data.sequence_length
        return tuple(load_task(t, self.encode, ends, length) for t in self.recipe.task)

    @cached_property
    def teacher(self) -> TrainingModel:
        """Whole in each process, for evaluation."""
        named = self.recipe.training.run.dtype
        half = named == "bfloat16" or (named == "auto" and self.group.device.type == "cuda")
        return load_teacher(self.files, torch.bfloat16 if half else torch.float32, self.group.device)

    @cached_property
    def teacher_scores(self) -> Scores:
        return score(Readout.of(self.teacher), self.tasks)

    def check_stop(self) -> None:
        """Raises Stopped in all processes if a stop was asked for in one."""
        if self.group.sum([float(self.stop.asked)])[0]:
            raise Stopped

    def spread(self, todo: Sequence[A], work: Callable[[A], B]) -> list[B]:
        """`work` of each, shared out among the processes; every one gets all results, in order."""
        rank, world = self.group.rank, self.group.world
        mine = {i: work(todo[i]) for i in range(rank, len(todo), world)}
        found = {k: v for part in (self.group.gather(mine) if world > 1 else [mine]) for k, v in part.items()}
        return [found[i] for i in range(len(todo))]

    def each(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The jobs' results, in order; those that are not there yet are made first. Raises Stopped."""
        missing = list({job.path: job for job in jobs if not job.path.exists()}.values())
        if self.workers is not None and missing:
            self.workers.run(self, missing)
        else:
            for job in missing:
                job.work(self)
        return [json.loads(job.path.read_text(encoding="utf-8")) for job in jobs]

    def result(self, step: str) -> dict[str, Any]:
        """What a step before this one has written."""
        path = self.output / step / RESULT
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise JetExportError(
                f"--output {self.output}: {step} is not there.", f"Run it first: --step {step}, or all steps."
            ) from None
        except ValueError:
            raise JetExportError(f"{path}: damaged.", f"Remove {path.parent} and run it again.") from None
        return values


RESULT = "result.json"


def train(session: Session, retrofit: Retrofit, output: Path, stages: int | None = None) -> Progress:
    """Run the retrofit's first `stages` stages (default: all) from the last checkpoint in `output`, or from the start.

    Raises Stopped after a stop that was asked for, and JetExportError as the trainer does."""
    recipe, group = retrofit.recipe, session.group
    session.check_stop()
    if group.first:
        output.mkdir(parents=True, exist_ok=True)
    group.barrier()
    checkpoints = Checkpoints(output / MODELS, group, recipe.checkpoint.keep, recipe.checkpoint.asynchronous)
    progress = checkpoints.last() or Progress()
    report = Report(
        output if group.first else None, session.say, done=progress.step, total=recipe.total_steps,
        every=recipe.run.log_every, tensorboard=False, bars=session.bars,
    )  # fmt: skip
    setting = Setting(recipe=recipe, group=group, checkpoints=checkpoints, report=report, stop=session.stop)
    try:
        while True:
            if progress.stage_step < recipe.steps_of(recipe.stage[progress.stage]):
                progress, goes_on = retrofit.run_stage(setting, progress)
                if not goes_on:
                    session.say(f"stopped after step {progress.step:,} of {output.name}; --resume goes on")
                    raise Stopped
                progress = checkpoints.last() or progress
            if progress.stage + 1 == (stages or len(recipe.stage)):
                return progress
            progress = replace(progress, stage=progress.stage + 1, stage_step=0)
    finally:
        report.close()


@torch.no_grad()
def trained(session: Session, retrofit: Retrofit, output: Path, progress: Progress) -> TrainingModel:
    """The student of that checkpoint, whole in each process."""
    student, _ = retrofit.models(session.group)
    checkpoints = Checkpoints(output / MODELS, session.group, retrofit.recipe.checkpoint.keep, False)
    checkpoints.load(progress, saved_parameters(student, retrofit.recipe, progress.stage))
    return student.eval()


def logged(output: Path) -> list[dict[str, Any]]:
    """The lines of a training's log."""
    return [json.loads(line) for line in (output / LOG).read_text(encoding="utf-8").splitlines()]
