"""Step 1, placement: the supernet is trained, then placements are scored by its paths.

result.json: layers' importance by task (what keeping one layer's attention gains over none), the best placement of each
number of layers by each objective, beside uniform spacing and the layers that one by one lower the KL to the teacher
most; and the layers that later steps keep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jet_export.postnas.beam import Placement, Worth, beam_search, greedy, uniform
from jet_export.postnas.evaluate import Objective, Readout, Scores, divergence, score, task_value, tells_apart
from jet_export.postnas.recipe import letters
from jet_export.postnas.session import Session, train, trained
from jet_export.postnas.supernet import SupernetObjective, path_readout
from jet_export.training.distributed import Group, shard
from jet_export.training.model import TrainingModel
from jet_export.training.recipe import StageRecipe
from jet_export.training.run import Retrofit
from jet_export.training.student import set_trainable
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically

EVALUATIONS = "evaluations.jsonl"


class SupernetRetrofit(Retrofit):
    """A retrofit whose objective is the supernet's. Its student has JetBlocks alone."""

    keep: tuple[int, ...] = (0,)
    kl_weight = 0.0
    stage_step = 0  # that the stage goes on from

    def objective(self, stage: StageRecipe, group: Group) -> tuple[SupernetObjective, TrainingModel | None]:
        student, teacher = self.models(group)
        set_trainable(student, stage.train)
        student, teacher = shard(student, group), shard(teacher, group)
        rows = self.recipe.data.batch // group.world
        return (
            SupernetObjective(
                student, teacher, self.keep, self.kl_weight, self.recipe.seed, self.stage_step,
                -(-rows // self.recipe.run.micro_batch),
            ),
            teacher,
        )  # fmt: skip

    def run_stage(self, setting: Any, progress: Any) -> Any:
        self.stage_step = progress.stage_step
        return super().run_stage(setting, progress)


class Evaluations:
    """Scores by placement, kept in a file as they come: a run that goes on does not make them again."""

    def __init__(self, session: Session, student: TrainingModel) -> None:
        self.session, self.student = session, student
        self.path = session.directory / EVALUATIONS
        self.known: dict[Placement, Scores] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                values = json.loads(line)
            except ValueError:  # cut off by a kill
                break
            self.known[tuple(values["attention"])] = values["scores"]
        if session.group.first:  # without a line that was cut off
            write_atomically(self.path, "".join(map(_line, self.known.items())))

    def __call__(self, placements: Sequence[Placement]) -> list[Scores]:
        """Raises Stopped between rounds of placements, which are kept."""
        size = max(8, self.session.group.world)
        missing = [p for p in dict.fromkeys(placements) if p not in self.known]
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            found = dict(zip(some, self.session.spread(some, self._score), strict=True))
            self.known |= found
            if self.session.group.first:
                with self.path.open("a", encoding="utf-8") as f:
                    f.write("".join(map(_line, found.items())))
            self.session.check_stop()
        return [self.known[p] for p in placements]

    def _score(self, placement: Placement) -> Scores:
        return score(path_readout(self.student, self.session.teacher, placement), self.session.tasks)


def _line(item: tuple[Placement, Scores]) -> str:
    return json.dumps({"attention": list(item[0]), "scores": item[1]}) + "\n"


def run_placement(session: Session) -> dict[str, Any]:
    """Raises JetExportError where placement.keep does not fit the teacher's layers."""
    recipe, layers = session.recipe, session.config.num_hidden_layers
    p = recipe.placement
    if max(p.keep) > layers or p.choose >= layers:
        raise JetExportError(
            f"placement.keep {list(p.keep)}, choose {p.choose}: the teacher has {layers} layers.",
            "Keep fewer attention layers.",
        )
    stage = StageRecipe(name="supernet", loss="features", steps=p.steps, tokens=p.tokens, lr=p.lr)
    made = recipe.student("j" * layers, (stage,))
    retrofit = SupernetRetrofit(made, session.output, session.device, session.encode)
    retrofit.keep, retrofit.kl_weight = p.keep, p.kl_weight
    output = session.directory / "supernet"
    progress = train(session, retrofit, output)
    student = trained(session, retrofit, output, progress)
    evaluations = Evaluations(session, student)
    session.say(f"scoring placements of {layers} layers")
    return _results(session, evaluations, _restore_one(session, student))


def _restore_one(session: Session, student: TrainingModel) -> list[float]:
    """KL to the teacher without attention layers, then with each layer's alone, on the first loss task."""
    teacher = Readout.of(session.teacher)
    task = next(t for t in session.tasks if not t.counts_answers)
    placements: list[Placement] = [(), *((i,) for i in range(len(student.layers)))]
    return session.spread(placements, lambda p: divergence(path_readout(student, session.teacher, p), teacher, task))


def _results(session: Session, evaluations: Evaluations, kl: list[float]) -> dict[str, Any]:
    recipe, layers, tasks = session.recipe.placement, session.config.num_hidden_layers, session.tasks
    (none,) = evaluations([()])
    single = evaluations([(i,) for i in range(layers)])
    names = ["combined", *(t.name for t in tasks)]
    objectives = {n: Objective(tasks, n, none, session.teacher_scores) for n in names}
    left_out = [t.name for t in tasks if not tells_apart(t, none, session.teacher_scores)]
    if left_out:
        session.say(
            f"combined leaves out {', '.join(left_out)}: no attention at all scores as the teacher, within noise"
        )
    found: dict[str, dict[int, Placement]] = {}
    for name, objective in objectives.items():

        def worth(placements: list[Placement], objective: Objective = objective) -> list[Worth]:
            return [objective(s) for s in evaluations(placements)]

        best = beam_search(layers, max(recipe.keep), recipe.beam, worth)
        found[f"learned: {name}"] = {k: best[k] for k in recipe.keep}
    found["uniform"] = {k: uniform(layers, k) for k in recipe.keep}
    found["restore-one KL"] = {k: greedy([-x for x in kl[1:]], k) for k in recipe.keep}
    rows = [
        {"method": method, "keep": k, "attention": list(p), "scores": s, "value": objectives["combined"].value(s)}
        for method, by_k in found.items()
        for k, p, s in zip(by_k, by_k.values(), evaluations(list(by_k.values())), strict=True)
    ]
    chosen = found[f"learned: {recipe.objective}"][recipe.choose]
    importance = {t.name: [task_value(t, s) - task_value(t, none) for s in single] for t in tasks}
    return {
        "layers": layers,
        "attention": list(chosen),
        "student_layers": letters(layers, chosen),
        "objective": recipe.objective,
        "tasks": {t.name: "accuracy" if t.counts_answers else "loss" for t in tasks},
        "left_out": left_out,
        "teacher": session.teacher_scores,
        "importance": importance,
        "kl": {"none": kl[0], "single": kl[1:]},
        "placements": rows,
        "evaluated": len(evaluations.known),
    }


def rank_of(path: Path) -> dict[Placement, Scores]:
    """The scores in a finished step's evaluations, by placement."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {tuple(v["attention"]): v["scores"] for v in lines}
