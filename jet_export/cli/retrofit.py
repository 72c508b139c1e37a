"""`jet-export retrofit`: reads the recipe and the options over it, and runs it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from jet_export.utils.errors import JetExportError

STOPPED = 143  # as a shell reports a program that SIGTERM ended


def retrofit(
    output: Annotated[Path, typer.Option(help="The run: checkpoints, log.jsonl, and the model in model/.")],
    recipe: Annotated[
        Path | None, typer.Option(help="TOML: docs/guides/retrofit.md; default: features, logits.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A Qwen2, Qwen2.5 or Qwen3 directory, or a hub id.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Text, JSONL or parquet; again for more.")] = None,
    student_layers: Annotated[
        str | None,
        typer.Option(help="A letter a layer (j, a, s: JetBlock, attention, window), jet-2b, or a config.json."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of new weights and of the mixture of sources.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
) -> None:
    """Train a Jet model from a full-attention teacher."""
    from jet_export.training.recipe import Recipe, SourceRecipe
    from jet_export.training.recipe_read import check_recipe, read_recipe
    from jet_export.training.run import run_retrofit

    whole = read_recipe(recipe) if recipe else Recipe()
    if teacher is not None:
        whole = replace(whole, teacher=teacher)
    if data:
        whole = replace(whole, data=replace(whole.data, source=tuple(SourceRecipe(path=str(p)) for p in data)))
    if student_layers is not None:
        whole = replace(whole, student=replace(whole.student, layers=student_layers))
    if seed is not None:
        whole = replace(whole, seed=seed)
    try:
        checked = check_recipe(whole, f"--recipe {recipe}" if recipe else "retrofit")
        ended = run_retrofit(checked, output, device=device, resume=resume, emit=typer.echo)
    except JetExportError:
        if int(os.environ.get("LOCAL_RANK", "0")):  # the first process of each machine says it
            raise typer.Exit(2) from None
        raise
    if not ended:
        raise typer.Exit(STOPPED)
