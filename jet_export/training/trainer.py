"""Trainer: the steps of one stage, from any of them on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from torch import Tensor

from jet_export.training.checkpoint import Checkpoints, Progress
from jet_export.training.data.stream import DataStream, StepRows
from jet_export.training.distributed import Group
from jet_export.training.model import TrainingModel, part_of
from jet_export.training.objective import Objective, StepLoss, backward
from jet_export.training.optimizer import clip_gradients, lr_at, make_optimizer, optimizer_tensors, set_lr
from jet_export.training.recipe import Recipe, StageRecipe
from jet_export.training.report import Report, StepRecord
from jet_export.training.stop import Stop
from jet_export.utils.errors import JetExportError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a stage runs in."""

    recipe: Recipe
    group: Group
    checkpoints: Checkpoints
    report: Report
    stop: Stop


class Trainer:
    """One stage. Checkpoints hold the parameters of the parts that it and the stages before it train."""

    def __init__(
        self,
        setting: Setting,
        stage: StageRecipe,
        objective: Objective,
        progress: Progress,
    ) -> None:
        self.setting, self.stage, self.objective, self.progress = setting, stage, objective, progress
        self.steps = setting.recipe.steps_of(stage)
        self.optimizer = make_optimizer(objective.student, stage, setting.recipe.optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """Of a checkpoint."""
        student = self.objective.student
        moments = {f"optimizer.{name}": t for name, t in optimizer_tensors(student, self.optimizer).items()}
        return {**saved_parameters(student, self.setting.recipe, self.progress.stage), **moments}

    def load(self) -> None:
        """Take the checkpoint of `progress`: parameters, and the moments if it lies within this stage."""
        p = self.progress
        if p.stage_step:
            self.setting.checkpoints.load(p, self.tensors())
        elif p.step:
            before = saved_parameters(self.objective.student, self.setting.recipe, p.stage - 1)
            self.setting.checkpoints.load(p, before)

    def run(self, stream: DataStream, flops_per_token: float, peak: float | None) -> bool:
        """Train until the stage ends, or a stop is asked for; then write a checkpoint. Returns whether the run goes on.

        Raises JetExportError for a loss that is not finite (the last checkpoint stays), data that cannot be read, and a
        checkpoint that cannot be written.
        """
        s, p = self.setting, self.progress
        stopped = False
        with s.report.stage(self.stage.name, p.stage_step, self.steps):
            while self.progress.stage_step < self.steps:
                self._step(stream, flops_per_token, peak)
                stopped = bool(s.group.sum([float(s.stop.asked)])[0])
                last = self.progress.stage_step == self.steps
                s.checkpoints.poll()
                if stopped or last:
                    break
                if self.progress.step % s.recipe.checkpoint.every == 0:
                    s.checkpoints.save(self.tensors(), self._gathered())
            if self.progress.step > p.step:
                s.checkpoints.save(self.tensors(), self._gathered(), wait=True)
        return not stopped

    def _step(self, stream: DataStream, flops_per_token: float, peak: float | None) -> None:
        s, p, recipe = self.setting, self.progress, self.setting.recipe
        began = time.monotonic()
        taken = self._rows(stream)
        lr = lr_at(self.stage, p.stage_step, self.steps)
        set_lr(self.optimizer, lr)
        sums = backward(self.objective, taken.rows, recipe.run.micro_batch, s.group)
        clipped = clip_gradients(self.optimizer, recipe.optimizer.clip, s.group)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, norm = sums.means(s.group), float(clipped)  # the step's only wait for a GPU
        self._check(loss, norm)
        seconds = time.monotonic() - began
        tokens = p.tokens + recipe.tokens_per_step
        self.progress = Progress(p.step + 1, p.stage, p.stage_step + 1, tokens, taken.states)
        speed = recipe.tokens_per_step / seconds
        record = StepRecord(
            step=self.progress.step, stage=self.stage.name, loss=loss.loss, parts=loss.parts, lr=lr, grad_norm=norm,
            tokens=self.progress.tokens, tokens_per_s=speed, seconds=seconds,
            mfu=speed / s.group.world * flops_per_token / peak if peak else None,
        )  # fmt: skip
        s.report.step(record, self.progress.stage_step)

    def _rows(self, stream: DataStream) -> StepRows:
        """Raises JetExportError in every process for data that one of them cannot read."""
        taken: StepRows | JetExportError
        try:
            taken = stream.next()
        except JetExportError as e:
            taken = e
        self.setting.group.agree(taken if isinstance(taken, JetExportError) else None)
        assert isinstance(taken, StepRows)
        return taken

    def _check(self, loss: StepLoss, norm: float) -> None:
        if math.isfinite(loss.loss) and math.isfinite(norm):
            return
        what = f"loss is {loss.loss}" if not math.isfinite(loss.loss) else f"gradient's norm is {norm}"
        steps = self.setting.checkpoints
        steps.finish()
        kept = steps.steps()
        stays = f"The checkpoint of step {kept[-1]} is kept." if kept else "There is no checkpoint yet."
        raise JetExportError(
            f"stage {self.stage.name}, step {self.progress.stage_step + 1}: the {what}. {stays}",
            "Lower lr, or lengthen warmup, and start again with another --output.",
        )

    def _gathered(self) -> Progress:
        """With the states of all processes' data streams."""
        p = self.progress
        shards = {k: v for states in self.setting.group.gather(p.shards) for k, v in states.items()}
        return Progress(p.step, p.stage, p.stage_step, p.tokens, dict(sorted(shards.items(), key=lambda s: int(s[0]))))


def saved_parameters(student: TrainingModel, recipe: Recipe, stage: int) -> dict[str, Tensor]:
    """The parameters that the checkpoints of stage number `stage` hold, by their names there."""
    parts = {part for s in recipe.stage[: stage + 1] for part in s.train}
    kinds = student.config.layer_types
    return {f"model.{n}": p.detach() for n, p in student.named_parameters() if part_of(n, kinds) in parts}
