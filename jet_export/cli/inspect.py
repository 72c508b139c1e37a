"""`jet-export inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle, or leave out and pass --model.")] = None,
    model: Annotated[str | None, typer.Option(help="Before building: a preset, directory or config.json.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at once.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="With --model: FP8 projections.")] = False,
    kv_cache_dtype: Annotated[str, typer.Option(help="With --model: auto or fp8.")] = "auto",
    state_dtype: Annotated[str, typer.Option(help="With --model: float32 or bfloat16.")] = "float32",
    prefill_chunk: Annotated[
        int | None, typer.Option(help="With --model: tokens a prefill call; default 2048.")
    ] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Milliseconds a token: the largest batch within it.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="With --tpot-ms: a bench.json; default those of this package.")
    ] = None,
) -> None:
    """Layers, precisions, sizes, and the memory that a batch and a context length take."""
    from jet_export.cli.inspect_report import InspectOptions, run_inspect

    run_inspect(
        InspectOptions(
            bundle=bundle,
            model=model,
            batch=batch,
            context=context,
            fp8=fp8,
            kv_cache_dtype=kv_cache_dtype,
            state_dtype=state_dtype,
            prefill_chunk=prefill_chunk,
            tpot_ms=tpot_ms,
            measured=measured,
        )
    )
