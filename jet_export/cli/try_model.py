"""`jet-export try`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jet_export.cli.options import command_line
from jet_export.utils.errors import JetExportError


def try_model(
    model: Annotated[str, typer.Argument(help="jet-2b, jet-4b, a checkpoint directory or a hub id.")] = "jet-2b",
    checkpoint: Annotated[Path | None, typer.Option(help="Directory with the weights of MODEL: no download.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="The architecture, no checkpoint.")] = False,
    precision: Annotated[str, typer.Option(help="Bundles to build, in order.")] = "fp8,bf16",
    backend: Annotated[str, typer.Option(help="inductor, tensorrt or tensorrt-rtx.")] = "inductor",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_batch_size: Annotated[int | None, typer.Option(help="Default: 32, on a CPU 4.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Default: 8192, on a CPU 1024, at most the model's.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's published code, to compare with it.")
    ] = False,
    reference_python: Annotated[
        Path | None, typer.Option(help="Interpreter of another environment, which runs the published code.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Default: try/<model>.")] = None,
) -> None:
    """Fetch, build, verify, compare and measure a model on this machine; writes try.json and try.md, a page to share.

    Exit status 1 where a step failed."""
    from jet_export.tryout.published import Published
    from jet_export.tryout.report import PAGE
    from jet_export.tryout.run import TryOptions, run_try

    if reference_python is not None and not reference_python.is_file():
        raise JetExportError(f"--reference-python {reference_python}: no such file.", "Name a Python interpreter.")
    options = TryOptions(
        model=model,
        output=output or Path("try") / (Path(model).name or "model"),
        checkpoint=checkpoint,
        random_weights=random_weights,
        precisions=tuple(p for p in precision.split(",") if p),
        backend=backend,
        device=device,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        published=Published(trust_remote_code, reference_python),
    )
    report = run_try(options, command_line(), typer.echo)
    for failure in report["failures"]:
        typer.echo(f"FAILED: {failure}")
    typer.echo(f"To read and to share: {options.output / PAGE}")
    if report["failures"]:
        raise typer.Exit(1)
