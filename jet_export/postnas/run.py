"""A whole PostNAS run: its steps in their order, each in a directory that bears its name once it is whole.

OUTPUT/recipe.json, OUTPUT/<step>/result.json and what the step's training leaves, OUTPUT/report.html, OUTPUT/model. A
step that is not whole yet lies in OUTPUT/.<step>, and goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from jet_export.postnas.parallel import Workers
from jet_export.postnas.recipe import STEPS, TOY, PostnasRecipe
from jet_export.postnas.report import report
from jet_export.postnas.session import RESULT, Session, Stopped
from jet_export.postnas.steps import RUN
from jet_export.postnas.toy import make_toy_teacher
from jet_export.training.distributed import processes
from jet_export.training.run import check_same_recipe
from jet_export.training.stop import stop_at_signals
from jet_export.utils.environment import environment
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import check_directory, replace_directory, write_atomically

RECIPE, REPORT, TEACHER = "recipe.json", "report.html", "teacher"


def run_postnas(
    recipe: PostnasRecipe,
    output: Path,
    *,
    steps: Sequence[str] = STEPS,
    device: str = "auto",
    parallel: int = 1,
    resume: bool = False,
    emit: Callable[[str], None],
) -> bool:
    """Run these steps of a checked recipe, `parallel` candidates of a step side by side. Returns whether they ended:
    False after a stop that was asked for.

    Raises JetExportError for a run of another recipe, a step that is there without `resume`, one whose predecessors are
    missing, and what a step cannot go on after: what is trained by then stays."""
    check_directory(output)
    check_output(output, recipe, steps, resume)
    with processes(device) as group, stop_at_signals() as stop, closing(Workers(parallel)) as workers:
        if group.world > 1 and parallel > 1:
            raise JetExportError(
                f"--parallel {parallel}: torchrun has begun {group.world} processes.", "Use one or the other."
            )
        if group.world > 1 and recipe.shapes.space and "shapes" in steps:
            raise JetExportError(
                "shapes.space: engines are measured by one process.",
                "Run the steps before and after it with torchrun, and --step shapes without.",
            )
        say = emit if group.first else _nothing
        made = replace(recipe, training=replace(recipe.training, teacher=_teacher(recipe, output)))
        if group.first:
            write_atomically(output / RECIPE, json.dumps(recipe.identity(), indent=1) + "\n")
            if recipe.training.teacher == TOY:
                make_toy_teacher(output / TEACHER, recipe.training.seed)
        group.barrier()
        session = Session(made, group, output, output, device, stop, say, workers=workers if parallel > 1 else None)
        done = 0
        try:
            for step in steps:
                done += run_step(session, step)
        except Stopped:
            say("stopped; --resume goes on")
            return False
        finally:
            if group.first and done:
                write_atomically(output / REPORT, report(results_of(output), environment()))
    return True


def run_step(session: Session, step: str) -> bool:
    """Whether there was something to do. Raises Stopped, and JetExportError as `run_postnas`."""
    output, group = session.output, session.group
    if (output / step / RESULT).exists():
        session.say(f"{step}: is there")
        return False
    session.say(f"{step}: begins" if not (output / f".{step}").exists() else f"{step}: goes on")
    session.directory = output / f".{step}"
    group.barrier()
    if group.first:
        session.directory.mkdir(parents=True, exist_ok=True)
    group.barrier()
    result = RUN[step](session)
    group.barrier()
    if group.first:
        write_atomically(session.directory / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
        replace_directory(session.directory, output / step)
    group.barrier()
    return True


def results_of(output: Path) -> dict[str, dict[str, Any]]:
    """The results of the steps that are whole, by name."""
    paths = {step: output / step / RESULT for step in STEPS}
    return {step: json.loads(path.read_text(encoding="utf-8")) for step, path in paths.items() if path.exists()}


def check_output(output: Path, recipe: PostnasRecipe, steps: Sequence[str], resume: bool) -> None:
    """Raises JetExportError for a run of another recipe, or one that is there and is not to be gone on with."""
    path = output / RECIPE
    if not path.exists():
        return
    check_same_recipe(path, recipe.identity(), f"--output {output}")
    begun = [s for s in steps if (output / s).exists() or (output / f".{s}").exists()]
    if begun and not resume:
        raise JetExportError(
            f"--output {output}: {begun[0]} is there already.", "Go on by --resume, or name another directory."
        )


def _teacher(recipe: PostnasRecipe, output: Path) -> str:
    return str(output / TEACHER) if recipe.training.teacher == TOY else recipe.training.teacher


def _nothing(line: str) -> None: ...
