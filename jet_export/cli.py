"""The `jet-export` command: each subcommand parses its options and calls one function."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from jet_export.errors import GPU_MEMORY, JetExportError, out_of_gpu_memory

app = typer.Typer(
    name="jet-export",
    help="Build, verify and run inference engines for Jet-Nemotron models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Option(help="jet-tiny, jet-2b, jet-4b, a checkpoint directory, config.json or a hub id.")]
DETERMINISTIC = "The same bits for a prompt whatever else runs with it; slower."
Bundle = Annotated[Path, typer.Argument(help="A directory made by `jet-export build`.", show_default=False)]


@app.command(epilog="Example: jet-export build --model jet-4b --fp8")
def build(
    model: Model = "jet-tiny",
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 projections, calibrated by nvidia-modelopt.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Directory with the weights of --model.")] = None,
    backend: Annotated[str, typer.Option(help="auto, inductor, tensorrt, tensorrt-rtx, or onnx (the graph).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Model dtype: bfloat16 or float32.")] = "bfloat16",
    keep: Annotated[list[str] | None, typer.Option(help="Leave layers in the model dtype, e.g. model.layers.7")] = None,
    fp8_lm_head: Annotated[bool, typer.Option("--fp8-lm-head", help="FP8 output projection too.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text to calibrate FP8 on.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (the model dtype) or fp8.")] = "auto",
    state_dtype: Annotated[str, typer.Option(help="Recurrent state: float32 or bfloat16.")] = "float32",
    max_batch_size: Annotated[int, typer.Option(help="Sequences the engine holds.")] = 8,
    max_seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence; default 4096 or the model's.")] = None,
    prefill_chunk: Annotated[int | None, typer.Option(help="Most tokens of a sequence a prefill call.")] = None,
    output: Annotated[Path | None, typer.Option(help="Default: bundles/<model>-<precision>-<backend>.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="The architecture, no checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Of --random-weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle built from other inputs.")] = False,
    sm: Annotated[str | None, typer.Option(help="TensorRT: SMs to hold kernels for, e.g. 8.0,8.9,9.0.")] = None,
    tensorrt_headers: Annotated[Path | None, typer.Option(help="TensorRT: the folder of NvInferRuntime.h.")] = None,
    fetch_headers: Annotated[
        bool, typer.Option("--fetch-headers", help="TensorRT: download its headers (Apache-2.0), hash checked.")
    ] = False,
    keep_onnx: Annotated[bool, typer.Option("--keep-onnx", help="TensorRT: keep the graph in the bundle.")] = False,
    decode_one: Annotated[
        bool, typer.Option("--decode-one/--no-decode-one", help="GPU: a faster package for one sequence alone.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Build an engine bundle from a checkpoint."""
    from jet_export.build import run_build
    from jet_export.plan import BuildOptions, make_plan
    from jet_export.report import print_plan

    options = BuildOptions(
        model, checkpoint, backend, device, dtype, fp8, fp8_lm_head, tuple(keep or ()), calibration, kv_cache_dtype,
        state_dtype, max_batch_size, max_seq_len, prefill_chunk, random_weights, seed, output, force,
        sm, tensorrt_headers, fetch_headers, keep_onnx, decode_one,
    )  # fmt: skip
    plan = make_plan(options)
    print_plan(plan)
    if not dry_run:
        out = run_build(plan, ["jet-export", *(shlex.quote(a) for a in sys.argv[1:])], typer.echo)
        typer.echo(f"Next: jet-export verify {out}   jet-export generate {out} --prompt TEXT")


@app.command(epilog='Example: jet-export generate bundles/jet-tiny-fp8-inductor --prompt "def "')
def generate(
    bundle: Bundle,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - reads standard input.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="UTF-8 file, a prompt a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to make.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps every token.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help=DETERMINISTIC)] = False,
) -> None:
    """Generate text with a bundle."""
    from jet_export.generate import read_prompts, stream

    texts = read_prompts(prompt, prompts)
    stream(bundle, texts, max_new_tokens, temperature, top_k, top_p, seed, ignore_eos, deterministic)


@app.command(epilog="Example: jet-export verify bundles/jet-tiny-fp8-inductor --json verify.json")
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
) -> None:
    """Compare a bundle's engine with the PyTorch model, state by state; exit status 1 where it fails, and with --ladder
    3 where nothing failed but a rung could not run."""
    if ladder:
        from jet_export.ladder.command import run_ladder

        raise typer.Exit(run_ladder(bundle, json_file, tensorrt_headers, fetch_headers, text, seed, typer.echo))
    if bundle is None:
        raise JetExportError("verify: which bundle?", "Name one made by `jet-export build`, or pass --ladder.")
    if tensorrt_headers or fetch_headers:
        raise JetExportError("verify: --tensorrt-headers and --fetch-headers belong to --ladder.")
    from jet_export.report import print_verification
    from jet_export.speed.verified import remember
    from jet_export.verify import verify_bundle

    result = verify_bundle(bundle, text, seed, typer.echo)
    remember(bundle, result)
    print_verification(result)
    if json_file:
        json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    if not result.passed:
        raise typer.Exit(1)


@app.command(epilog="Example: jet-export bench bundles/jet-2b-fp8-inductor --protocol paper --baseline qwen3-1.7b")
def bench(
    bundle: Bundle,
    protocol: Annotated[str, typer.Option(help="latency, paper (its batches and chunks) or serving.")] = "latency",
    contexts: Annotated[str | None, typer.Option(help="Tokens held, e.g. 1024,4096,64k.")] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences at once, e.g. 1,8; auto: the most that fit.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Decode steps of each case.")] = 128,
    baseline: Annotated[list[str] | None, typer.Option(help="qwen3-1.7b, qwen3-1.7b:fp8, or a bundle.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for bench.json, bench.csv and bench.png.")] = None,
    fill_seconds: Annotated[float, typer.Option(help="Longer prefills are replaced by synthetic states.")] = 60.0,
) -> None:
    """Measure speed and memory, beside the roofline; verified first, and nothing is timed where that fails."""
    from jet_export.speed.command import BenchOptions, run_bench
    from jet_export.speed.protocols import Asked, parse_batches, parse_contexts

    if new_tokens < 2:
        raise JetExportError(f"--new-tokens {new_tokens}: must be at least 2.")
    asked = Asked(protocol, parse_contexts(contexts), parse_batches(batch), new_tokens)
    options = BenchOptions(bundle, asked, tuple(baseline or ()), output, fill_seconds)
    run_bench(options, ["jet-export", *(shlex.quote(a) for a in sys.argv[1:])], typer.echo)


@app.command(epilog="Example: jet-export inspect --model jet-4b --batch 64 --context 65536")
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
        Path | None, typer.Option(help="With --tpot-ms: a bench.json; default a committed one.")
    ] = None,
) -> None:
    """Layers, precisions, sizes, and the memory that a batch and a context length take."""
    from jet_export.report import check_inspect, inspect_bundle, inspect_model, print_prediction

    check_inspect(bundle, model, batch, context, fp8, kv_cache_dtype, state_dtype, prefill_chunk, tpot_ms, measured)
    chunk = prefill_chunk or 2048
    if tpot_ms is not None:
        print_prediction(bundle, model, context, tpot_ms, measured, (fp8, kv_cache_dtype, state_dtype), chunk)
        return
    if bundle is not None:
        inspect_bundle(bundle, batch, context)
    else:
        assert model is not None
        inspect_model(model, batch or 1, context, fp8, kv_cache_dtype, state_dtype, chunk)


@app.command(epilog="Example: jet-export serve bundles/jet-tiny-fp8-inductor --openai --port 8000")
def serve(
    bundle: Bundle,
    openai: Annotated[
        bool, typer.Option("--openai", help="An OpenAI-compatible HTTP endpoint, without Triton.")
    ] = False,
    triton_repo: Annotated[Path | None, typer.Option(help="Only write a Triton model repository here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in --triton-repo.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --openai; 0 picks a free one.")] = 8000,
    http_port: Annotated[int, typer.Option(help="Triton's HTTP; 0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Triton's gRPC; 0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Triton's metrics; 0 picks a free one.")] = 8002,
    instances: Annotated[int, typer.Option(help="Engines behind Triton: on the CPU, or on each of --gpus.")] = 1,
    gpus: Annotated[str, typer.Option(help="GPUs that Triton uses, such as 0,1.")] = "0",
    slots: Annotated[int | None, typer.Option(help="Sequences at once; default the bundle's max_batch_size.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="KV room of all sequences; default the most they need.")] = None,
    token_budget: Annotated[int | None, typer.Option(help="Tokens a step; default 512 on a CPU, else 2048.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests in the queue; more are refused (429, Triton: 503).")] = 256,
    wait_timeout: Annotated[float, typer.Option(help="Seconds in the queue; then 503.")] = 60.0,
    deterministic: Annotated[bool, typer.Option("--deterministic", help=DETERMINISTIC)] = False,
    prefix_cache_bytes: Annotated[
        str, typer.Option(help="Memory for what shared prompt prefixes left, e.g. 512M or 4G; 0: none is kept.")
    ] = "0",
) -> None:
    """Answer many users at once, until SIGTERM or Ctrl-C: in Triton Inference Server, or over OpenAI's HTTP API."""
    from jet_export.runtime.capacity import Serving

    prefix_bytes = parse_bytes(prefix_cache_bytes, "--prefix-cache-bytes")
    serving = Serving(slots, kv_tokens, token_budget, max_waiting, wait_timeout, deterministic, prefix_bytes)
    if openai:
        if triton_repo:
            raise JetExportError("serve: --openai and --triton-repo exclude each other.")
        from jet_export.server.serve import serve as run_openai

        run_openai(bundle, host, port, serving, typer.echo)
        return
    from jet_export.server.triton_repo import Repository, gpu_indices, write_repository
    from jet_export.server.tritonserver import Ports, run_triton

    repository = Repository(bundle, serving, instances, gpu_indices(gpus))
    if triton_repo:
        write_repository(triton_repo, repository, force, typer.echo)
    else:
        run_triton(repository, host, Ports(http_port, grpc_port, metrics_port), typer.echo)


@app.command("export-hf", epilog="Example: jet-export export-hf --model jet-4b --fp8 --output jet-4b-fp8")
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
    from jet_export.export_hf import run_export
    from jet_export.plan import BuildOptions

    options = BuildOptions(
        model, checkpoint, backend="onnx", device=device, fp8=fp8, fp8_lm_head=fp8_lm_head, keep=tuple(keep or ()),
        calibration=calibration, kv_cache_dtype=kv_cache_dtype, random_weights=random_weights, seed=seed,
        output=output, force=force,
    )  # fmt: skip
    run_export(options, target, typer.echo)


@app.command(epilog="Example: jet-export search --model jet-2b --output searches/jet-2b")
def search(
    model: Model = "jet-2b",
    backend: Annotated[str, typer.Option(help="Of the engines that are measured: auto or inductor.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Model dtype: bfloat16 or float32.")] = "bfloat16",
    space: Annotated[Path | None, typer.Option(help="TOML (docs/search.md); default: the paper's table.")] = None,
    scores: Annotated[str, typer.Option(help="parameters, paper, a file, or FILE.py:FUNCTION.")] = "parameters",
    sampler: Annotated[str, typer.Option(help="auto, exact, grid, tpe or nsga2.")] = "auto",
    trials: Annotated[int | None, typer.Option(help="Points that Optuna looks at; default 200.")] = None,
    whole: Annotated[int, typer.Option(help="Points on the front that are built whole and measured.")] = 3,
    jobs: Annotated[int | None, typer.Option(help="Engines built at a time; default half the cores, up to 4.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which no further engine is built.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Default: searches/<model>-<backend>.")] = None,
    database: Annotated[Path | None, typer.Option(help="Measurements; default: measurements.db beside it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --output.")] = False,
    keep_engines: Annotated[bool, typer.Option("--keep-engines", help="Leave the bundles on disk.")] = False,
    build_only: Annotated[bool, typer.Option("--build-only", help="Build, for a later call to measure.")] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure again what repeats do not confirm.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the points and engines, and stop.")] = False,
) -> None:
    """Choose head sizes, precisions and layouts by the latency of engines measured here."""
    from jet_export.search.cli import run_command
    from jet_export.search.run import SearchOptions

    options = SearchOptions(
        model, backend, device, dtype, space, scores, sampler, trials, whole, jobs, timeout, seed, output, database,
        resume, keep_engines, build_only, remeasure,
    )  # fmt: skip
    run_command(options, dry_run, typer.echo)


def parse_bytes(text: str, option: str) -> int:
    """512M, 4G, or a number of bytes; K, M, G are powers of 1024. Raises JetExportError."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isascii() or not digits.isdigit():
        raise JetExportError(f"{option} {text}: not a size.", "Give bytes, or a number with K, M or G, e.g. 512M.")
    return int(digits) * unit


def main() -> None:
    """Console entry point. Bad input: one message on standard error, exit status 2."""
    try:
        app()
    except JetExportError as e:
        typer.echo(f"error: {e}", err=True)
        sys.exit(2)
    except RuntimeError as e:
        said = out_of_gpu_memory(f"{type(e).__name__}: {e}")
        if said is None:
            raise
        typer.echo(f"error: {said}\n{GPU_MEMORY}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
