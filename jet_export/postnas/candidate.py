"""Candidates: students that get the same short retrofit and are compared by the tasks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from jet_export.model.jet_dims import JetDims
from jet_export.postnas.evaluate import Readout, score
from jet_export.postnas.mixer import Mixer, Sizes, replace_mixers
from jet_export.postnas.recipe import BudgetRecipe, short_stages
from jet_export.postnas.session import RESULT, Job, Session, logged, train, trained
from jet_export.training.distributed import Group
from jet_export.training.model import TrainingModel
from jet_export.training.recipe import StageRecipe
from jet_export.training.run import Retrofit
from jet_export.utils.files import write_atomically

SPEED = "tokens_per_s"  # the only entry of a result that two runs do not share


class MixerRetrofit(Retrofit):
    """A retrofit whose student has other mixers in place of JetBlocks."""

    make: Callable[[Sizes], Mixer] | None = None

    def models(self, group: Group) -> tuple[TrainingModel, TrainingModel]:
        student, teacher = super().models(group)
        if self.make is not None:
            replace_mixers(student, self.make, self.recipe.seed)
        return student, teacher


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """`directory`: a name under the step's. `make`: the mixer in place of JetBlocks; None: JetBlocks."""

    name: str
    directory: str
    layers: str  # student.layers
    seed: int = 0
    dims: JetDims | None = None  # None: the recipe's
    make: Callable[[Sizes], Mixer] | None = None

    def retrofit(self, session: Session, stages: tuple[StageRecipe, ...]) -> MixerRetrofit:
        recipe = session.recipe.student(self.layers, stages, self.seed)
        if self.dims is not None:
            H, K, V = self.dims
            student = replace(recipe.student, num_heads=H, head_k_dim=K, head_v_dim=V)
            recipe = replace(recipe, student=student)
        retrofit = MixerRetrofit(recipe, session.output, session.device, session.encode)
        retrofit.make = self.make
        return retrofit


def run_candidates(session: Session, candidates: Sequence[Candidate], budget: BudgetRecipe) -> list[dict[str, Any]]:
    """Their losses, scores and sizes, in order. Raises Stopped."""
    return session.each(
        [
            Job(session.directory / c.directory / RESULT, partial(_run_candidate, candidate=c, budget=budget))
            for c in candidates
        ]
    )


def _run_candidate(session: Session, candidate: Candidate, budget: BudgetRecipe) -> None:
    directory = session.directory / candidate.directory
    session.say(f"candidate {candidate.name}" + (f", seed {candidate.seed}" if budget.seeds > 1 else ""))
    finish(session, directory, train_candidate(session, candidate, directory, short_stages(budget)))


def train_candidate(
    session: Session, candidate: Candidate, directory: Path, stages: tuple[StageRecipe, ...], until: int | None = None
) -> dict[str, Any]:
    """Trains the first `until` stages, and scores what comes out."""
    retrofit = candidate.retrofit(session, stages)
    progress = train(session, retrofit, directory, until)
    student = trained(session, retrofit, directory, progress)
    log = logged(directory)
    mixers = [layer.self_attn for layer in student.training_layers if layer.kind == "jet"]
    tail = {s.name: [line["loss"] for line in log if line["stage"] == s.name] for s in stages}
    H, K, V = retrofit.config.jet_dims(candidate.layers.index("j"))
    return {
        "name": candidate.name,
        "seed": candidate.seed,
        "size": f"{K}x{V}x{H}",
        "state_bytes": 4 * H * K * V * len(mixers),  # fp32, a sequence, all layers
        "mixer_parameters": sum(p.numel() for m in mixers for p in m.parameters()),
        "tokens": progress.tokens,
        "training_loss": {name: _tail(losses) for name, losses in tail.items() if losses},
        "scores": score(Readout.of(student), session.tasks),
        SPEED: median([line["tokens_per_s"] for line in log][1:] or [line["tokens_per_s"] for line in log]),
    }


def finish(session: Session, directory: Path, result: dict[str, Any]) -> None:
    """The result lies in the directory, and the checkpoints go."""
    session.group.barrier()
    if session.group.first:
        write_atomically(directory / RESULT, json.dumps(result, indent=1) + "\n")
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    session.group.barrier()


def _tail(losses: list[float]) -> float:
    """Mean of the last tenth."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def slug(name: str) -> str:
    """A directory's name."""
    kept = "".join(c if c.isalnum() else "-" for c in name.lower())
    return "-".join(filter(None, kept.split("-")))
