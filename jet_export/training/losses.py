"""The losses of a batch, as sums whose parts add up over micro-batches and processes.

features   for each JetBlock: its output on the teacher's input, against the output of the teacher's attention:
           mean over rows of sum((y - t)^2) / sum(t^2)
logits     kl_weight KL(teacher || student) at a temperature + ce_weight cross-entropy of the next token:
           means over the tokens that have one
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jet_export.kernels.linear_kl import linear_kl
from jet_export.training.data.rows import Batch
from jet_export.training.model import TrainingModel
from jet_export.training.recipe import StageRecipe


class Features(NamedTuple):
    """Of the teacher's layers that the student replaces."""

    layers: list[int]
    inputs: list[Tensor]  # [T, hidden] each
    outputs: list[Tensor]  # [T, hidden] each: of the mixer


class TeacherLogits(NamedTuple):
    """Logits, as factors: hidden @ weight^T."""

    hidden: Tensor  # [T, hidden]
    weight: Tensor  # [vocab, hidden]


@dataclass(frozen=True)
class Losses:
    """`total` is what to differentiate: a sum over `count` rows or tokens. `parts`: sums as well, detached."""

    total: Tensor
    count: int
    parts: dict[str, Tensor]


@torch.no_grad()
def teacher_features(teacher: TrainingModel, batch: Batch, layers: Collection[int]) -> Features:
    """Runs in the teacher's forward."""
    inputs, outputs = [], []
    for i, (h, out) in enumerate(teacher.run_layers(batch)):
        if i in layers:
            inputs.append(h)
            outputs.append(out.mixed)
        if i >= max(layers):
            break
    return Features(sorted(layers), inputs, outputs)


@torch.no_grad()
def teacher_logits(teacher: TrainingModel, batch: Batch) -> TeacherLogits:
    """Runs in the teacher's forward."""
    return TeacherLogits(teacher.last_hidden(batch), teacher.lm_head.weight.detach())


def feature_losses(student: TrainingModel, batch: Batch, features: Features) -> Losses:
    """Runs in the student's forward. Layers do not see each other, so one backward trains them all."""
    context = student.context(batch)
    parts = {}
    for i, h, wanted in zip(features.layers, features.inputs, features.outputs, strict=True):
        mixed = student.layers[i](h, context, mixer_only=True).mixed
        parts[f"layer_{i}"] = relative_error(mixed, wanted, batch.rows).sum()
    total = torch.stack(list(parts.values())).mean()
    return Losses(total, batch.rows, {name: loss.detach() for name, loss in parts.items()})


def relative_error(y: Tensor, wanted: Tensor, rows: int) -> Tensor:
    """[rows]: sum((y - wanted)^2) / sum(wanted^2) of each row, in fp32."""
    y, wanted = (x.float().view(rows, -1) for x in (y, wanted))
    return (y - wanted).square().sum(1) / wanted.square().sum(1).clamp(min=1e-12)


def logits_losses(student: TrainingModel, batch: Batch, teacher: TeacherLogits | None, stage: StageRecipe) -> Losses:
    """Runs in the student's forward. `teacher`: None where kl_weight is 0."""
    x = student.last_hidden(batch)
    w = student.lm_head.weight.to(x.dtype)
    xt, wt = (x.detach(), w.detach()) if teacher is None else (teacher.hidden, teacher.weight.to(x.dtype))
    kl_weight, ce_weight, temperature = stage.kl_weight, stage.ce_weight, stage.temperature
    with torch.autocast(x.device.type, enabled=False):  # the op chooses its own precision
        total, kl, ce = linear_kl(
            x, w, xt, wt, batch.labels, kl_weight=kl_weight, ce_weight=ce_weight, temperature=temperature
        )
    parts = {"kl": kl, "ce": ce} if teacher else {"ce": ce}
    n = batch.targets
    return Losses(total * n, n, {name: loss.detach() * n for name, loss in parts.items()})
