"""`jet-export verify`, and `--ladder`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jet_export.cli.options import TrustedKey
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically

if TYPE_CHECKING:
    from jet_export.ladder.climb import LadderOptions
    from jet_export.verify.verify import Verification

SHOWN_FAILURES = 12
LADDER_REPORT = Path("ladder.json")
INCOMPLETE_STATUS = 3  # nothing failed, but not everything ran


def verify(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; --ladder builds jet-tiny without one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out UTF-8 text for bits per byte and KL.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="Every check from the kernels up; stops at the first that fails.")
    ] = False,
    tensorrt_headers: Annotated[Path | None, typer.Option(help="--ladder: folder of NvInferRuntime.h.")] = None,
    fetch_headers: Annotated[bool, typer.Option("--fetch-headers", help="--ladder: download TensorRT's.")] = False,
    trusted_key: TrustedKey = None,
) -> None:
    """Compare a bundle's engine with the PyTorch model, state by state. Exit status 1 where it fails; with --ladder, 3
    where nothing failed but a rung could not run."""
    if ladder:
        from jet_export.ladder.climb import LadderOptions

        options = LadderOptions(
            bundle=bundle,
            report=json_file or LADDER_REPORT,
            tensorrt_headers=tensorrt_headers,
            fetch_headers=fetch_headers,
            text=text,
            seed=seed,
        )
        raise typer.Exit(run_ladder(options, typer.echo))
    if bundle is None:
        raise JetExportError("verify: which bundle?", "Name one made by `jet-export build`, or pass --ladder.")
    if tensorrt_headers or fetch_headers:
        raise JetExportError("verify: --tensorrt-headers and --fetch-headers belong to --ladder.")
    from jet_export.bench.verified import remember
    from jet_export.verify.verify import verify_bundle

    result = verify_bundle(bundle, text, seed, typer.echo)
    remember(bundle, result)
    print_verification(result)
    if json_file:
        write_atomically(json_file, json.dumps(result.to_dict(), indent=2) + "\n")
    if not result.passed:
        raise typer.Exit(1)


def print_verification(v: Verification) -> None:
    """The table of stages, the first failures, and the verdict."""
    from jet_export.utils.console import console

    out = console()
    out.width = max(out.width, 112)
    out.print(v.table())
    failures = v.failures()
    for line in failures[:SHOWN_FAILURES]:
        out.print(line, markup=False)
    if len(failures) > SHOWN_FAILURES:
        out.print(f"and {len(failures) - SHOWN_FAILURES} more (--json FILE writes them all)", markup=False)
    out.print("PASSED" if v.passed else "FAILED", markup=False)


def run_ladder(options: LadderOptions, emit: Callable[[str], None]) -> int:
    """Run the rungs, print their results and the report's path. Returns the exit status."""
    from jet_export.ladder.climb import FAILED, PASSED, climb, summary, table
    from jet_export.utils.console import console
    from jet_export.verify.verify import read_text

    if options.text is not None:
        read_text(options.text)  # raises before anything runs
    result = climb(options, emit)
    out = console()
    out.print(table(result))
    out.print(summary(result), markup=False)
    out.print(f"Report, to keep or to share: {options.report}", markup=False)
    return {PASSED: 0, FAILED: 1}.get(result["outcome"], INCOMPLETE_STATUS)
