"""Scores of a model on tasks, and its divergence from the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.postnas.tasks import Item, Task
from jet_export.training.data.rows import IGNORED, Batch
from jet_export.training.model import TrainingModel

ROWS = {"cpu": 8, "cuda": 32}  # items in a batch


@dataclass(frozen=True)
class Readout:
    """A model as logits in factors: hidden(batch) [T, hidden] @ weight^T, weight [vocab, hidden]."""

    hidden: Callable[[Batch], Tensor]
    weight: Tensor
    device: torch.device

    @classmethod
    def of(cls, model: TrainingModel) -> Readout:
        def hidden(batch: Batch) -> Tensor:
            out: Tensor = model(batch, lambda m, b: m.last_hidden(b))
            return out

        return cls(hidden, model.lm_head.weight.detach(), model.embed_tokens.weight.device)

    def logits(self, batch: Batch, at: Tensor) -> Tensor:
        """fp32 [len(at), vocab] of the tokens at these places."""
        x = self.hidden(batch)[at]
        return F.linear(x, self.weight.to(x.dtype)).float()


Scores = dict[str, dict[str, float]]  # by task: loss (nats a scored token), and accuracy where answers count


@torch.no_grad()
def score(model: Readout, tasks: Sequence[Task]) -> Scores:
    return {task.name: _score_task(model, task) for task in tasks}


def _score_task(model: Readout, task: Task) -> dict[str, float]:
    loss, right, answers, scored = 0.0, 0, 0, 0
    for items, batch in batches(task.items, model.device):
        at = (batch.labels != IGNORED).nonzero()[:, 0]
        logits = model.logits(batch, at)
        wanted = batch.labels[at]
        loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        scored += len(at)
        hits = torch.zeros_like(batch.labels, dtype=torch.bool)
        hits[at] = logits.argmax(-1) == wanted
        for i, item in enumerate(items):
            mine = hits[i * batch.length : (i + 1) * batch.length].tolist()
            right += sum(all(mine[start - 1 : stop - 1]) for start, stop in item.spans)
            answers += len(item.spans)
    out = {"loss": loss / scored}
    return {**out, "accuracy": right / answers} if task.counts_answers else out


@torch.no_grad()
def divergence(model: Readout, teacher: Readout, task: Task) -> float:
    """KL(teacher || model), nats a scored token."""
    total, scored = 0.0, 0
    for _, batch in batches(task.items, model.device):
        at = (batch.labels != IGNORED).nonzero()[:, 0]
        ours, theirs = (m.logits(batch, at).log_softmax(-1) for m in (model, teacher))
        total += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
        scored += len(at)
    return total / scored


def batches(items: Sequence[Item], device: torch.device) -> Iterator[tuple[Sequence[Item], Batch]]:
    """Items a few at a time, padded to the longest of all."""
    length, rows = max(len(item.tokens) for item in items), ROWS[device.type]
    for start in range(0, len(items), rows):
        some = items[start : start + rows]
        yield some, Batch.of([item.row(length) for item in some], device)


@dataclass(frozen=True)
class Objective:
    """Compares scores; larger is better. `combined`: the mean over the tasks that tell a model without attention layers
    from the teacher, by weight, of the share of the way from the one to the other."""

    tasks: tuple[Task, ...]
    name: str  # combined, or a task's
    low: Scores  # of the model without attention layers
    high: Scores  # the teacher's

    def __call__(self, scores: Scores) -> tuple[float, float]:
        """The value, and what breaks ties between equal accuracies: less loss."""
        return self.value(scores), -sum(scores[t.name]["loss"] for t in self._mine)

    def value(self, scores: Scores) -> float:
        if self.name != "combined":
            return task_value(self._mine[0], scores)
        shares = [(t.recipe.weight, self._share(t, scores)) for t in self.tasks if tells_apart(t, self.low, self.high)]
        weights = sum(w for w, _ in shares)
        return sum(w * share for w, share in shares) / weights if shares else 0.0

    def _share(self, task: Task, scores: Scores) -> float:
        low, high = (task_value(task, s) for s in (self.low, self.high))
        return (task_value(task, scores) - low) / (high - low)

    @property
    def _mine(self) -> list[Task]:
        return [t for t in self.tasks if self.name in ("combined", t.name)]


def task_value(task: Task, scores: Scores) -> float:
    """Larger is better: the accuracy, or the loss with its sign turned."""
    return scores[task.name]["accuracy"] if task.counts_answers else -scores[task.name]["loss"]


def tells_apart(task: Task, low: Scores, high: Scores) -> bool:
    """Whether a task's values of two models differ; accuracies by more than two standard errors, as of answers that are
    right by chance each."""
    gap = abs(task_value(task, high) - task_value(task, low))
    if not task.counts_answers:
        return gap > 1e-6
    answers = sum(len(item.spans) for item in task.items)
    variance = sum(p * (1 - p) for p in (task_value(task, low), task_value(task, high))) / max(answers, 1)
    return gap > max(2 * math.sqrt(variance), 1e-6)
