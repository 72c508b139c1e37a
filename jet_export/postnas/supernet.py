"""The once-for-all supernet: a student of JetBlocks alone beside the teacher; a path takes each layer's mixer from one
of them. Everything but the JetBlocks is the teacher's, shared and frozen, so one training serves every placement.

Each step draws how many layers keep their attention, of those that are looked at, and which. Loss: for each JetBlock on
the path, its output on the path's hidden states against the teacher's mixer on the teacher's (relative squared error,
mean over layers), with gradients through the whole path; and, if asked for, KL of the logits.
Source: the paper's description (PostNAS, step 1) and its authors in NVlabs/Jet-Nemotron#18; their code is not public.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jet_export.kernels.linear_kl import linear_kl
from jet_export.postnas.evaluate import Readout
from jet_export.training.data.rows import Batch, Row
from jet_export.training.layer import LayerOutput
from jet_export.training.losses import Features, Losses, relative_error, teacher_features
from jet_export.training.model import TrainingModel


def path_layers(
    student: TrainingModel, teacher: TrainingModel, batch: Batch, attention: Collection[int]
) -> Iterator[tuple[Tensor, LayerOutput]]:
    """Each layer's input [T, hidden] and output; layers of `attention` are the teacher's. Runs in both forwards."""
    context = teacher.context(batch)
    h = student.embed(batch)
    for i, layer in enumerate(student.layers):
        out: LayerOutput = (teacher.layers[i] if i in attention else layer)(h, context)
        yield h, out
        h = out.hidden


def path_readout(student: TrainingModel, teacher: TrainingModel, attention: Collection[int]) -> Readout:
    """The placement's model, for evaluation."""

    def last(t: TrainingModel, s: TrainingModel, batch: Batch) -> Tensor:
        for _, out in path_layers(s, t, batch, attention):
            h = out.hidden
        x: Tensor = s.norm(h)
        return x

    def hidden(batch: Batch) -> Tensor:
        out: Tensor = teacher(batch, lambda t, b: student(b, lambda s, b: last(t, s, b)))
        return out

    return Readout(hidden, student.lm_head.weight.detach(), student.embed_tokens.weight.device)


def draw_path(seed: int, step: int, layers: int, keep: Sequence[int]) -> tuple[int, ...]:
    """The layers that keep their attention in this step; one at least is linear."""
    rng = random.Random(f"supernet/{seed}/{step}")
    k = rng.choice([n for n in keep if n < layers])
    return tuple(sorted(rng.sample(range(layers), k)))


@dataclass
class SupernetObjective:
    """What the supernet's training minimises, as `Trainer` wants it."""

    student: TrainingModel
    teacher: TrainingModel
    keep: tuple[int, ...]
    kl_weight: float
    seed: int
    step: int  # of the next call
    calls_per_step: int  # micro-batches
    calls: int = 0

    def __call__(self, batch: Batch) -> Losses:
        step = self.step + self.calls // self.calls_per_step
        self.calls += 1
        attention = draw_path(self.seed, step, len(self.student.layers), self.keep)
        linear = [i for i in range(len(self.student.layers)) if i not in attention]
        features: Features = self.teacher(batch, lambda m, b: teacher_features(m, b, linear))
        wanted: Tensor | None = self.teacher(batch, _last_hidden) if self.kl_weight else None
        out: Losses = self.teacher(
            batch, lambda t, b: self.student(b, lambda s, b: self._losses(s, t, b, features, wanted))
        )
        return out

    def _losses(
        self, student: TrainingModel, teacher: TrainingModel, batch: Batch, features: Features, wanted: Tensor | None
    ) -> Losses:
        targets = dict(zip(features.layers, features.outputs, strict=True))
        attention = [i for i in range(len(student.layers)) if i not in targets]
        parts, errors = {}, []
        for i, (_, out) in enumerate(path_layers(student, teacher, batch, attention)):
            if i in targets:
                errors.append(relative_error(out.mixed, targets[i], batch.rows).sum())
            h = out.hidden
        total = parts["features"] = torch.stack(errors).mean()
        if wanted is not None:
            x = student.norm(h)
            w = student.lm_head.weight.to(x.dtype)
            kl, _, _ = linear_kl(x, w, wanted, w.detach(), batch.labels, kl_weight=1.0, ce_weight=0.0)
            parts["kl"] = kl * batch.rows
            total = total + self.kl_weight * parts["kl"]
        return Losses(total, batch.rows, {name: loss.detach() for name, loss in parts.items()})

    def count(self, rows: Sequence[Row]) -> int:
        return len(rows)


@torch.no_grad()
def _last_hidden(model: TrainingModel, batch: Batch) -> Tensor:
    return model.last_hidden(batch)
