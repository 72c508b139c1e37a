"""`jet-export eval`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from jet_export.cli.options import Bundle, Deterministic, TrustedKey, command_line
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import check_file


def evaluate(
    bundle: Bundle,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names with commas between: local tasks (recall, bits_per_byte, code_completion, needle), "
            "lm-evaluation-harness's, or directories of its YAML files."
        ),
    ],
    limit: Annotated[int | None, typer.Option(help="Documents of each task, at most.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="A bundle to compare with, on the same documents.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of local tasks by length, e.g. 1024,4096.")] = "",
    text: Annotated[Path | None, typer.Option(help="UTF-8 text of bits_per_byte, code_completion and recall.")] = None,
    deterministic: Deterministic = False,
    trusted_key: TrustedKey = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Write every document and answer to this file.")] = None,
) -> None:
    """Evaluate a bundle's quality with lm-evaluation-harness, with standard errors."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    for option, file in (("--json", json_file), ("--samples", samples)):
        if file is not None:
            check_file(file, option)
    from jet_export.evaluation.report import remarks, table, write_json, write_samples
    from jet_export.evaluation.run import EvalOptions, run_evaluation
    from jet_export.utils.console import console

    options = EvalOptions(
        bundle=bundle,
        tasks=tuple(t.strip() for t in tasks.split(",") if t.strip()),
        limit=limit,
        baseline=baseline,
        lengths=parse_lengths(lengths),
        text=text,
        deterministic=deterministic,
    )
    result = run_evaluation(options, lambda line: typer.echo(line, err=True))
    out = console()
    out.print(table(result))
    for line in remarks(result):
        out.print(line, markup=False)
    if json_file:
        write_json(json_file, result, command_line())
    if samples:
        write_samples(samples, result)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Raises JetExportError for what is not numbers with commas between."""
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not all(p.isascii() and p.isdigit() for p in parts):
        raise JetExportError(f"--lengths {text}: not numbers of tokens.", "E.g. --lengths 1024,4096.")
    return tuple(sorted({int(p) for p in parts}))
