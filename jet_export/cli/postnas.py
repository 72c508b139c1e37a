"""`jet-export postnas`: reads the recipe, and runs its steps."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

STOPPED = 143  # as a shell reports a program that SIGTERM ended


class Step(StrEnum):
    PLACEMENT = "placement"
    BLOCK = "block"
    DESIGN = "design"
    SHAPES = "shapes"
    RETROFIT = "retrofit"


def postnas(
    recipe: Annotated[Path, typer.Argument(help="TOML: docs/guides/postnas.md.")],
    output: Annotated[Path, typer.Option(help="A directory a step, report.html, and the model in model/.")],
    step: Annotated[Step | None, typer.Option(help="This step alone; default: all, in this order.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    parallel: Annotated[
        int,
        typer.Option(min=1, help="Candidates of block, design and shapes that train side by side, each in a process."),
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --output.")] = False,
) -> None:
    """Make a Jet model of a full-attention model: placement, block, design, shapes, retrofit."""
    from jet_export.postnas.recipe import STEPS
    from jet_export.postnas.recipe_read import read_postnas_recipe
    from jet_export.postnas.run import REPORT, run_postnas
    from jet_export.training.run import MODEL

    whole = read_postnas_recipe(recipe)
    steps = (step.value,) if step else STEPS
    ended = run_postnas(whole, output, steps=steps, device=device, parallel=parallel, resume=resume, emit=typer.echo)
    if not ended:
        raise typer.Exit(STOPPED)
    typer.echo(f"written: {output / REPORT}")
    if (output / MODEL).exists():
        typer.echo(f"Next: jet-export build --model {output / MODEL}")
