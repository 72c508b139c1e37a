"""Step 4: JetBlock sizes. Scores come from short retrofits by successive halving; where the recipe names a space file,
`jet-export search` then chooses among the sizes left by the latency of engines that it builds and measures here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_dims import JetDims
from jet_export.postnas.candidate import Candidate, train_candidate
from jet_export.postnas.evaluate import Objective, Scores
from jet_export.postnas.recipe import ShapesRecipe
from jet_export.postnas.session import Job, Session
from jet_export.search.output import write_results
from jet_export.search.run import run_search
from jet_export.search.search import Search
from jet_export.search.space import read_space
from jet_export.search.spec import SearchOptions, SearchSpec
from jet_export.training.recipe import StageRecipe
from jet_export.training.student import student_config
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically

SEARCH, BASE, SCORES = "search", "base.json", "scores.json"


def run_shapes(session: Session) -> dict[str, Any]:
    """Raises JetExportError for sizes that do not fit, or differ in state elements."""
    recipe = session.recipe.shapes
    placement = session.result("placement")
    layers = placement["student_layers"]
    base = student_config(session.config, session.recipe.student(layers, ()).student)
    sizes = _sizes(recipe, base)
    stages = rungs_of(recipe)
    low: Scores = next(row["scores"] for row in placement["placements"] if row["keep"] == 0)
    objective = Objective(session.tasks, placement["objective"], low, session.teacher_scores)
    left, rungs = [Candidate(name=str(d), directory=str(d), layers=layers, dims=d) for d in sizes], []
    for rung in range(recipe.rungs):
        rows = _rung(session, left, stages, rung)
        worth = {row["name"]: objective(row["scores"]) for row in rows}
        rows = [{**row, "rung": rung, "value": worth[row["name"]][0]} for row in rows]
        rungs.append(sorted(rows, key=lambda row: worth[row["name"]], reverse=True))
        if rung + 1 < recipe.rungs:
            left = sorted(left, key=lambda c: worth[c.name], reverse=True)[: max(1, len(left) // recipe.eta)]
    scores = {row["name"]: row["value"] for row in rungs[-1]}
    chosen, why = rungs[-1][0]["name"], "the best score"
    if recipe.space:
        chosen, why = _search(session, base, scores)
    if session.group.first:
        for directory in session.directory.glob("*/checkpoints"):
            shutil.rmtree(directory, ignore_errors=True)
    return {"chosen": chosen, "why": why, "scores": scores, "measured": bool(recipe.space), "rungs": rungs}


def rungs_of(recipe: ShapesRecipe) -> tuple[StageRecipe, ...]:
    """Features and a stage of logits a rung, with a constant rate; with rung r, eta^r times as many steps in all."""
    steps = [recipe.logits_steps * recipe.eta**r for r in range(recipe.rungs)]
    more = [now - before for now, before in zip(steps, [0, *steps], strict=False)]
    features = StageRecipe(name="features", loss="features", steps=recipe.feature_steps, lr=recipe.lr)
    logits = tuple(
        StageRecipe(name=f"rung-{r}", loss="logits", steps=n, lr=recipe.logits_lr, schedule="constant")
        for r, n in enumerate(more)
    )
    return ((features,) if recipe.feature_steps else ()) + logits


def _rung(
    session: Session, candidates: Sequence[Candidate], stages: tuple[StageRecipe, ...], rung: int
) -> list[dict[str, Any]]:
    jobs = [(c, session.directory / c.directory / f"rung-{rung}.json") for c in candidates]
    return session.each(
        [Job(path, partial(_train_on, candidate=c, stages=stages, rung=rung, path=path)) for c, path in jobs]
    )


def _train_on(session: Session, candidate: Candidate, stages: tuple[StageRecipe, ...], rung: int, path: Path) -> None:
    session.say(f"candidate {candidate.name}, rung {rung}")
    until = len(stages) - session.recipe.shapes.rungs + rung + 1
    row = train_candidate(session, candidate, path.parent, stages, until)
    session.group.barrier()
    if session.group.first:
        write_atomically(path, json.dumps(row, indent=1) + "\n")
    session.group.barrier()


def _sizes(recipe: ShapesRecipe, base: JetNemotronConfig) -> tuple[JetDims, ...]:
    if recipe.space:
        sizes = read_space(Path(recipe.space), base).sizes
    else:
        parts = (tuple(map(int, size.split("x"))) for size in recipe.sizes)
        sizes = tuple(dict.fromkeys(JetDims(H, K, V) for K, V, H in parts))
    states = {str(d): d.num_heads * d.head_k_dim * d.head_v_dim for d in sizes}
    if len(set(states.values())) > 1:
        raise JetExportError(
            f"shapes: states differ: {', '.join(f'{name} has {n:,} elements' for name, n in states.items())}.",
            "Sizes are compared at one state: head_k_dim * head_v_dim * num_heads is the same.",
        )
    for d in sizes:
        base.with_jet_dims({i: d for i, kind in enumerate(base.layer_types) if kind == "jet"})  # raises
    return sizes


def _search(session: Session, base: JetNemotronConfig, scores: dict[str, float]) -> tuple[str, str]:
    """`jet-export search` with these scores: the size that it chooses, and why."""
    files = {
        BASE: base.to_dict(),
        SCORES: {"name": "short retrofit", "source": "postnas, step shapes", "scores": scores},
    }
    for name, values in files.items():
        write_atomically(session.directory / name, json.dumps(values, indent=1) + "\n")
    output = session.directory / SEARCH
    options = SearchOptions(
        model=str(session.directory / BASE),
        space=Path(session.recipe.shapes.space),
        scores=str(session.directory / SCORES),
        device=session.device,
        output=output,
        whole=1,
        resume=output.exists(),
    )
    search = Search(SearchSpec.from_options(options))
    run_search(search, session.say)
    write_results(search)
    best = search.chosen
    assert best is not None
    return str(best.point.sizes[0]), search.state.reason or ""
