"""One step's loss and gradients: an objective of a batch, summed over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jet_export.training.data.rows import Batch, Row, targets_of
from jet_export.training.distributed import Group, average_whole_gradients
from jet_export.training.losses import (
    Features,
    Losses,
    TeacherLogits,
    feature_losses,
    logits_losses,
    teacher_features,
    teacher_logits,
)
from jet_export.training.model import TrainingModel
from jet_export.training.recipe import StageRecipe


class Objective(Protocol):
    """What a stage minimises."""

    student: TrainingModel

    def __call__(self, batch: Batch) -> Losses: ...

    def count(self, rows: Sequence[Row]) -> int:
        """What `Losses.count` will be for these rows."""
        ...


class FeatureObjective:
    """JetBlocks' outputs against those of the teacher's attention, layer by layer."""

    def __init__(self, student: TrainingModel, teacher: TrainingModel, layers: Collection[int] | None = None) -> None:
        jet = [i for i, kind in enumerate(student.config.layer_types) if kind == "jet"]
        self.student, self.teacher = student, teacher
        self.layers = sorted(jet if layers is None else layers)

    def __call__(self, batch: Batch) -> Losses:
        features: Features = self.teacher(batch, lambda m, b: teacher_features(m, b, self.layers))
        out: Losses = self.student(batch, lambda m, b: feature_losses(m, b, features))
        return out

    def count(self, rows: Sequence[Row]) -> int:
        return len(rows)


class LogitsObjective:
    """KL to the teacher's logits, and cross-entropy of the next token. `teacher`: None where kl_weight is 0."""

    def __init__(self, student: TrainingModel, teacher: TrainingModel | None, stage: StageRecipe) -> None:
        self.student, self.teacher, self.stage = student, teacher, stage

    def __call__(self, batch: Batch) -> Losses:
        wanted: TeacherLogits | None = None
        if self.teacher is not None and self.stage.kl_weight:
            wanted = self.teacher(batch, teacher_logits)
        out: Losses = self.student(batch, lambda m, b: logits_losses(m, b, wanted, self.stage))
        return out

    def count(self, rows: Sequence[Row]) -> int:
        return targets_of(rows)


@dataclass(frozen=True)
class StepLoss:
    """Means over the rows or tokens of all processes."""

    loss: float
    parts: dict[str, float]


@dataclass(frozen=True)
class StepSums:
    """Of this process's losses, on its device: the total, then the parts."""

    values: Tensor  # [1 + parts] fp64
    names: tuple[str, ...]
    count: float  # rows or tokens of all processes

    def means(self, group: Group) -> StepLoss:
        """Waits for the device."""
        total, *parts = (s / self.count for s in group.sum(self.values.tolist()))
        return StepLoss(total, dict(zip(self.names, parts, strict=True)))


def backward(objective: Objective, rows: Sequence[Row], micro_batch: int, group: Group) -> StepSums:
    """Adds the gradients of the step's mean loss to the student's parameters. `rows`: this process's, taken
    `micro_batch` at a time; every process has as many."""
    student = objective.student.train()
    (count,) = group.sum([float(objective.count(rows))])
    total, parts = torch.zeros((), device=group.device, dtype=torch.float64), dict[str, Tensor]()
    for start in range(0, len(rows), micro_batch):
        losses = objective(Batch.of(rows[start : start + micro_batch], group.device))
        (losses.total * (group.world / count)).backward()  # type: ignore[no-untyped-call]
        total += losses.total.detach()
        for name, value in losses.parts.items():
            parts[name] = parts.get(name, torch.zeros_like(total)) + value
    average_whole_gradients(student, group)
    return StepSums(torch.stack([total, *parts.values()]), tuple(parts), count)
