"""`jet-export build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jet_export.cli.options import Model, command_line

if TYPE_CHECKING:
    from jet_export.build.plan import BuildPlan


def build(
    model: Model = "jet-tiny",
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 projections, calibrated by nvidia-modelopt.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Directory with the weights of --model.")] = None,
    backend: Annotated[str, typer.Option(help="auto, inductor, tensorrt, tensorrt-rtx, or onnx (the graph).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Model dtype: bfloat16 or float32.")] = "bfloat16",
    keep: Annotated[list[str] | None, typer.Option(help="Leave layers in the model dtype, e.g. model.layers.7")] = None,
    fp8_lm_head: Annotated[bool, typer.Option("--fp8-lm-head", help="FP8 output projection too.")] = False,
    fast_accumulation: Annotated[
        bool,
        typer.Option(
            "--fast-accumulation", help="FP8 products by cuBLAS' fast accumulation, SM 8.9 and 9.0: less exact sums."
        ),
    ] = False,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text to calibrate FP8 on.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (the model dtype) or fp8.")] = "auto",
    state_dtype: Annotated[str, typer.Option(help="Recurrent state: float32 or bfloat16.")] = "float32",
    state_interval: Annotated[
        str,
        typer.Option(help="Write the recurrent states every so many tokens; auto: as measured on this kind of GPU."),
    ] = "1",
    speculate: Annotated[int, typer.Option(help="The most drafts that a step verifies, up to 15; 0: none.")] = 0,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Qwen3.5: with the checkpoint's multi-token-prediction layer, to draft by.")
    ] = False,
    max_batch_size: Annotated[int, typer.Option(help="Sequences the engine holds.")] = 8,
    max_seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence; default 4096 or the model's.")] = None,
    prefill_chunk: Annotated[int | None, typer.Option(help="Most tokens of a sequence in a prefill call.")] = None,
    output: Annotated[Path | None, typer.Option(help="Default: bundles/<model>-<precision>-<backend>.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="The architecture, no checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Of --random-weights.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Of --random-weights: where tokenizer.json is.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle built from other inputs.")] = False,
    sm: Annotated[str | None, typer.Option(help="TensorRT: SMs to compile kernels for, e.g. 8.0,8.9,9.0.")] = None,
    tensorrt_headers: Annotated[Path | None, typer.Option(help="TensorRT: the folder of NvInferRuntime.h.")] = None,
    fetch_headers: Annotated[
        bool, typer.Option("--fetch-headers", help="TensorRT: download its headers (Apache-2.0), hash checked.")
    ] = False,
    keep_onnx: Annotated[bool, typer.Option("--keep-onnx", help="TensorRT: keep the graph in the bundle.")] = False,
    decode_one: Annotated[
        bool, typer.Option("--decode-one/--no-decode-one", help="GPU: a faster package for one sequence alone.")
    ] = True,
    fuse_decode: Annotated[
        bool,
        typer.Option(
            "--fuse-decode",
            help="Experimental, SM 9.0 on: decode of up to 64 sequences by linear layers of our own, norms and "
            "activations inside of them, kernels that overlap.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Build an engine bundle from a checkpoint."""
    from jet_export.build.build import run_build
    from jet_export.build.plan import BuildOptions, make_plan
    from jet_export.build.state_interval import parse_interval

    options = BuildOptions(
        model=model,
        checkpoint=checkpoint,
        backend=backend,
        device=device,
        dtype=dtype,
        fp8=fp8,
        fp8_lm_head=fp8_lm_head,
        fast_accumulation=fast_accumulation,
        keep=tuple(keep or ()),
        calibration=calibration,
        kv_cache_dtype=kv_cache_dtype,
        state_dtype=state_dtype,
        state_interval=parse_interval(state_interval),
        speculate=speculate,
        mtp=mtp,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        random_weights=random_weights,
        seed=seed,
        tokenizer=tokenizer,
        output=output,
        force=force,
        sm=sm,
        tensorrt_headers=tensorrt_headers,
        fetch_headers=fetch_headers,
        keep_onnx=keep_onnx,
        decode_one=decode_one,
        fuse_decode=fuse_decode,
    )
    plan = make_plan(options)
    print_plan(plan)
    if not dry_run:
        out = run_build(plan, command_line(), typer.echo)
        typer.echo(f"Next: jet-export verify {out}   jet-export generate {out} --prompt TEXT")


def print_plan(plan: BuildPlan) -> None:
    """Print what will be done, before any of it."""
    from jet_export.bundle.dtypes import dtype_name
    from jet_export.cli.tables import architecture
    from jet_export.model.hub import checkpoint_licence
    from jet_export.utils.console import console, human

    o, m = plan.options, plan.memory
    fast = " by fast accumulation" if o.fast_accumulation else ""
    precision = f"fp8 projections{fast}, the rest bfloat16" if plan.fp8 else dtype_name(plan.dtypes.model)
    known = checkpoint_licence(plan.directory) if plan.directory is not None and not o.random_weights else None
    licence = "none (random weights)" if o.random_weights else known or "unknown: see the checkpoint's page"
    kv_cache, state = dtype_name(plan.dtypes.kv_cache), dtype_name(plan.dtypes.state)
    every, source = plan.interval.tokens, plan.interval.source
    if every > 1 or source:
        state += f", written every {f'{every} tokens' if every > 1 else 'token'}"
        state += f" (kernels/configs.json: {source})" if source else ""
    sequences = f"{plan.limits.max_batch_size} sequences x {plan.limits.max_seq_len} tokens"
    limits = f"{sequences}, prefill in chunks of {plan.limits.prefill_chunk}"
    limits += f", up to {o.speculate} drafts a step" if o.speculate else ""
    limits += " by the checkpoint's multi-token-prediction layer" if o.mtp else ""
    arch = plan.target["arch"] + (f" ({plan.target['gpu']})" if "gpu" in plan.target else "")
    rows = [
        ("model", f"{o.model}: {architecture(plan.config)}"),
        ("weights", f"{plan.source}, {human(m.weights)}"),
        ("licence", licence),
        ("precision", f"{precision}; KV cache {kv_cache}, state {state}"),
        ("backend", f"{plan.backend.name} ({plan.backend.reason})"),
        ("device", f"{plan.target['device']} {arch}"),
        ("limits", limits),
        ("memory", f"{human(m.total)} running; about {human(plan.build_memory)} to build"),
        ("disk", human(plan.disk_bytes) + (f", download {human(plan.download_bytes)}" if plan.download_bytes else "")),
        ("time", f"about {plan.seconds:.0f} s, most of it compiling"),
        ("output", str(plan.output)),
    ]
    out = console()
    for name, value in rows:
        out.print(f"{name:<10} {value}", markup=False)
    for warning in plan.warnings:
        out.print(f"warning    {warning}", markup=False)
