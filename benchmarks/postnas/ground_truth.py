"""What the supernet's ranking is worth: placements that are really retrofitted, beside their scores as paths.

Every placement of one attention layer gets a short retrofit ([block]'s steps); and for each k of placement.keep the
learned, the uniform and the restore-one-KL placements do, with several seeds. Candidates that are there are not trained
again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jet_export.postnas.beam import rank_correlation
from jet_export.postnas.candidate import Candidate, run_candidates
from jet_export.postnas.evaluate import task_value
from jet_export.postnas.placement import EVALUATIONS, rank_of
from jet_export.postnas.recipe import letters
from jet_export.postnas.session import Session


def retrofits(session: Session, placements: Iterable[tuple[int, ...]], seeds: int) -> list[dict[str, Any]]:
    """The results of each placement by each seed."""
    strings = [letters(session.config.num_hidden_layers, p) for p in placements]
    candidates = [Candidate(name=s, directory=f"{s}-{i}", layers=s, seed=i) for s in strings for i in range(seeds)]
    return run_candidates(session, candidates, session.recipe.block)


def correlations(session: Session, run: Path) -> dict[str, Any]:
    """By task: of the k = 1 placements' values in the supernet, and of their KL, with those after retrofits."""
    placement = session.result("placement")
    paths = rank_of(run / "placement" / EVALUATIONS)
    layers = range(session.config.num_hidden_layers)
    truth = retrofits(session, [(i,) for i in layers], seeds=1)
    out = {}
    for task in session.tasks:
        real = [task_value(task, row["scores"]) for row in truth]
        guessed = [task_value(task, paths[(i,)]) for i in layers]
        out[task.name] = {
            "retrofits": real,
            "supernet": guessed,
            "rank_correlation": {
                "supernet": rank_correlation(guessed, real),
                "restore-one KL": rank_correlation([-x for x in placement["kl"]["single"]], real),
            },
        }
    return out


def methods(session: Session) -> list[dict[str, Any]]:
    """The placements that are compared, by method and number of attention layers. Learned ones are of the recipe's
    objective, and of the tasks whose measure is a loss, which is finer than a count of right answers."""
    placement = session.result("placement")
    losses = [name for name, measure in placement["tasks"].items() if measure == "loss"]
    learned = dict.fromkeys(f"learned: {name}" for name in (session.recipe.placement.objective, *losses))
    names, rows = (*learned, "uniform", "restore-one KL"), placement["placements"]
    return [row for name in names for row in rows if row["method"] == name and row["keep"]]


def learned_and_uniform(session: Session, seeds: int) -> list[dict[str, Any]]:
    """Values by method, k and task: of each seed, their mean and standard deviation."""
    out, rows = [], methods(session)
    trained = retrofits(session, [tuple(row["attention"]) for row in rows], seeds)
    for i, row in enumerate(rows):
        results = trained[i * seeds : (i + 1) * seeds]
        values = {t.name: [task_value(t, r["scores"]) for r in results] for t in session.tasks}
        spread = {
            name: {"values": v, "mean": mean(v), "stdev": stdev(v) if seeds > 1 else 0.0} for name, v in values.items()
        }
        out.append({"method": row["method"], "keep": row["keep"], "attention": row["attention"], "tasks": spread})
    return out
