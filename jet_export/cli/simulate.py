"""`jet-export simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jet_export.cli.options import parse_bytes
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    from jet_export.simulate.cluster import Autoscale


def simulate(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle, or leave out and pass --model.")] = None,
    model: Annotated[str | None, typer.Option(help="Before building: a preset, directory or config.json.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="With --model: FP8 projections.")] = False,
    kv_cache_dtype: Annotated[str, typer.Option(help="With --model: auto or fp8.")] = "auto",
    max_batch_size: Annotated[int, typer.Option(help="With --model: sequences the engine holds.")] = 64,
    max_seq_len: Annotated[int, typer.Option(help="With --model: tokens a sequence.")] = 4096,
    measured: Annotated[
        Path | None, typer.Option(help="A bench.json: the step times; default those of this package.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Requests: CSV with arrival,prompt,output[,session], or Azure's or Mooncake's format."),
    ] = None,
    speed_up: Annotated[float, typer.Option(help="With --trace: requests arrive so many times as fast.")] = 1.0,
    rate: Annotated[float | None, typer.Option(help="Instead of --trace: requests a second, at random.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests; default 1000, of a trace all.")] = None,
    prompt_tokens: Annotated[float, typer.Option(help="With --rate: mean, log-normal.")] = 1024,
    output_tokens: Annotated[float, typer.Option(help="With --rate: mean, log-normal.")] = 128,
    sigma: Annotated[float, typer.Option(help="With --rate: sigma of the lengths' logarithms; 0: all alike.")] = 0.5,
    turns: Annotated[int, typer.Option(help="With --rate: requests of a session, each continuing the last.")] = 1,
    think: Annotated[float, typer.Option(help="With --turns: mean seconds between two requests of a session.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    replicas: Annotated[str, typer.Option(help="Engines, each on a GPU; auto: the fewest that meet --slo.")] = "1",
    slo: Annotated[str | None, typer.Option(help="E.g. ttft=500ms,tpot=30ms; also e2e.")] = None,
    share: Annotated[float, typer.Option(help="With --replicas auto: of the requests that must meet --slo.")] = 0.99,
    router: Annotated[str, typer.Option(help="prefix (and session), least (loaded) or round-robin.")] = "prefix",
    autoscale: Annotated[str | None, typer.Option(help="MIN:MAX replicas, by --target-requests.")] = None,
    target_requests: Annotated[float, typer.Option(help="With --autoscale: requests a replica.")] = 32,
    start_seconds: Annotated[float, typer.Option(help="With --autoscale: until a new replica serves.")] = 60,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Mean hours until a replica fails; default: none does.")
    ] = None,
    restart_seconds: Annotated[float, typer.Option(help="With --mtbf-hours: until another takes its place.")] = 120,
    step_overhead_us: Annotated[
        float, typer.Option(help="Added to every step: what no table holds, such as sampling.")
    ] = 0.0,
    slots: Annotated[int | None, typer.Option(help="As of serve.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="As of serve.")] = None,
    token_budget: Annotated[int | None, typer.Option(help="As of serve.")] = None,
    mixed_prefill: Annotated[int | None, typer.Option(help="As of serve.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="As of serve.")] = None,
    max_waiting: Annotated[int, typer.Option(help="As of serve.")] = 256,
    wait_timeout: Annotated[float, typer.Option(help="As of serve.")] = 60.0,
    prefix_cache_bytes: Annotated[str | None, typer.Option(help="As of serve.")] = None,
    output: Annotated[Path | None, typer.Option(help="A directory for report.html, result.json, requests.csv.")] = None,
) -> None:
    """How a load would be served, and by how many GPUs: the real scheduler over measured step times."""
    from jet_export.bundle.limits import Limits
    from jet_export.runtime.capacity import Serving
    from jet_export.simulate.cluster import Failures
    from jet_export.simulate.command import SimulateOptions, run_simulate
    from jet_export.simulate.engine import CHUNK, bundle_engine, model_engine
    from jet_export.simulate.load import Lengths, Poisson, sped_up
    from jet_export.simulate.measures import parse_slo
    from jet_export.simulate.trace import read_trace

    if (bundle is None) == (model is None):
        raise JetExportError("simulate: give a bundle or --model, one of the two.")
    if (trace is None) == (rate is None):
        raise JetExportError("simulate: give --trace or --rate, one of the two.")
    if bundle is not None:
        engine = bundle_engine(bundle, measured)
    else:
        assert model is not None
        limits = Limits(max_batch_size=max_batch_size, max_seq_len=max_seq_len, prefill_chunk=min(CHUNK, max_seq_len))
        engine = model_engine(model, fp8=fp8, kv_cache_dtype=kv_cache_dtype, limits=limits, measured=measured)
    if trace is not None:
        load, name = sped_up(read_trace(trace, requests), speed_up), f"{trace.name}, {speed_up:g} times as fast"
    else:
        assert rate is not None
        prompt, answer = Lengths(mean=prompt_tokens, sigma=sigma), Lengths(mean=output_tokens, sigma=sigma)
        load = Poisson(
            rate=rate, requests=requests or 1000, prompt=prompt, output=answer, seed=seed, turns=turns, think=think
        ).draw()
        name = f"Poisson, {rate:g}/s, {prompt_tokens:g} and {output_tokens:g} tokens (sigma {sigma:g}), {turns} turns"
    prefix = prefix_cache_bytes
    failures = None
    if mtbf_hours is not None:
        failures = Failures(mtbf_s=3600 * mtbf_hours, restart_s=restart_seconds, seed=seed)
    options = SimulateOptions(
        engine=engine,
        serving=Serving(
            slots=slots,
            kv_tokens=kv_tokens,
            token_budget=token_budget,
            mixed_prefill=mixed_prefill,
            tpot_ms=tpot_ms,
            max_waiting=max_waiting,
            wait_timeout=wait_timeout,
            prefix_cache_bytes=None if prefix is None else parse_bytes(prefix, "--prefix-cache-bytes"),
        ),
        load=load,
        load_name=name,
        replicas=_replicas(replicas),
        slo=parse_slo(slo) if slo else None,
        share=share,
        router=router,
        autoscale=_autoscale(autoscale, target_requests, start_seconds) if autoscale else None,
        failures=failures,
        step_overhead=1e-6 * step_overhead_us,
        output=output,
    )
    run_simulate(options, typer.echo)


def _replicas(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise JetExportError(f"simulate --replicas {text}: neither a number of at least 1 nor auto.")
    return int(text)


def _autoscale(text: str, target: float, start: float) -> Autoscale:
    from jet_export.simulate.cluster import Autoscale

    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal()):
        raise JetExportError(f"simulate --autoscale {text}: not MIN:MAX.", "For example: 2:16")
    return Autoscale(least=int(least), most=int(most), target=target, start_s=start)
