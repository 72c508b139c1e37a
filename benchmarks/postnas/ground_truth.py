"""What the supernet's ranking is worth: placements that are really retrofitted, beside their scores as paths.

    python benchmarks/postnas/ground_truth.py benchmarks/postnas/h200.toml --run runs/postnas \
        --output runs/postnas-truth --minutes 9                      # again until it says done

After step placement of --run. Every placement of one attention layer gets a short retrofit ([block]'s steps), and for
each k of placement.keep the learned and the uniform placement do, with --seeds seeds each. truth.json: Spearman's rank
correlation of the supernet's scores and of restore-one KL with the retrofits', by task; learned against uniform.
Candidates that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from pieces import pieces

from jet_export.postnas.beam import rank_correlation
from jet_export.postnas.candidate import Candidate, run_candidate
from jet_export.postnas.evaluate import task_value
from jet_export.postnas.placement import rank_of
from jet_export.postnas.recipe import letters
from jet_export.postnas.recipe_read import read_postnas_recipe
from jet_export.postnas.session import Session, Stopped
from jet_export.training.distributed import processes
from jet_export.training.stop import stop_at_signals
from jet_export.utils.files import write_atomically


def retrofit(session: Session, placement: tuple[int, ...], seed: int) -> dict[str, Any]:
    layers = letters(session.config.num_hidden_layers, placement)
    candidate = Candidate(name=layers, directory=f"{layers}-{seed}", layers=layers, seed=seed)
    return run_candidate(session, candidate, session.recipe.block)


def correlations(session: Session, run: Path) -> dict[str, Any]:
    """By task: of the k = 1 placements' values in the supernet, and of their KL, with those after retrofits."""
    placement = session.result("placement")
    paths = rank_of(run / "placement/evaluations.jsonl")
    layers = range(session.config.num_hidden_layers)
    truth = [retrofit(session, (i,), 0) for i in layers]
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


def learned_and_uniform(session: Session, seeds: int) -> list[dict[str, Any]]:
    recipe, rows = session.recipe.placement, session.result("placement")["placements"]
    out: list[dict[str, Any]] = []
    for method in (f"learned: {recipe.objective}", "uniform", "restore-one KL"):
        for row in rows:
            if row["method"] == method and row["keep"]:
                results = [retrofit(session, tuple(row["attention"]), seed) for seed in range(seeds)]
                values = {t.name: [task_value(t, r["scores"]) for r in results] for t in session.tasks}
                means = {name: mean(v) for name, v in values.items()}
                out.append(
                    {"method": method, "keep": row["keep"], "attention": row["attention"], "mean": means} | values
                )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="the --output of jet-export postnas")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=9)
    args = parser.parse_args()
    recipe = read_postnas_recipe(args.recipe)
    if recipe.training.teacher == "toy":
        recipe = replace(recipe, training=replace(recipe.training, teacher=str(args.run / "teacher")))
    args.output.mkdir(parents=True, exist_ok=True)
    with pieces(args.minutes), processes(args.device) as group, stop_at_signals() as stop:

        def say(line: str) -> None:
            if group.first:
                print(line, flush=True)

        session = Session(recipe, group, args.run, args.output, args.device, stop, say)
        try:
            truth: dict[str, Any] = {"correlations": correlations(session, args.run)}
            truth |= {"placements": learned_and_uniform(session, args.seeds)}
        except Stopped:
            print("not done: run the same command again")
            return
        if group.first:
            write_atomically(args.output / "truth.json", json.dumps(truth, indent=1) + "\n")
            for name, values in truth["correlations"].items():
                print(f"{name}: rank correlation {values['rank_correlation']}")
            print(f"done: {args.output / 'truth.json'}")


if __name__ == "__main__":
    main()
