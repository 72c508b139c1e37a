"""`jet-export export-hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jet_export.cli.options import Model


def export_hf(
    output: Annotated[Path, typer.Option(help="Directory to write.", show_default=False)],
    model: Model = "jet-tiny",
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 projections, calibrated by nvidia-modelopt.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Directory with the weights of --model.")] = None,
    target: Annotated[str, typer.Option(help="hf, or trtllm-1.2 (legacy engine flow).")] = "hf",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (the model dtype) or fp8: writes its scales.")] = "auto",
    keep: Annotated[list[str] | None, typer.Option(help="Leave layers in the model dtype, e.g. model.layers.7")] = None,
    fp8_lm_head: Annotated[bool, typer.Option("--fp8-lm-head", help="FP8 output projection too.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text to calibrate FP8 on.")] = None,
    device: Annotated[str, typer.Option(help="Where to calibrate: auto, cpu or cuda.")] = "auto",
    random_weights: Annotated[bool, typer.Option("--random-weights", help="The architecture, no checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Of --random-weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Write a Hugging Face checkpoint, FP8 in nvidia-modelopt's unified format, for TensorRT-LLM and others."""
    from jet_export.build.export_hf import run_export
    from jet_export.build.plan import BuildOptions

    options = BuildOptions(
        model=model,
        checkpoint=checkpoint,
        backend="onnx",
        device=device,
        fp8=fp8,
        fp8_lm_head=fp8_lm_head,
        keep=tuple(keep or ()),
        calibration=calibration,
        kv_cache_dtype=kv_cache_dtype,
        random_weights=random_weights,
        seed=seed,
        output=output,
        force=force,
    )
    run_export(options, target, typer.echo)
