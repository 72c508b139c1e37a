"""`jet-export bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jet_export.cli.options import Bundle, TrustedKey, command_line
from jet_export.utils.errors import JetExportError


def bench(
    bundle: Bundle,
    protocol: Annotated[str, typer.Option(help="latency, paper (its batches and chunks) or serving.")] = "latency",
    contexts: Annotated[str | None, typer.Option(help="Tokens held, e.g. 1024,4096,64k.")] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences at once, e.g. 1,8; auto: the most that fit.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Decode steps of each case.")] = 128,
    baseline: Annotated[list[str] | None, typer.Option(help="qwen3-1.7b, qwen3-1.7b:fp8, or a bundle.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for bench.json, bench.csv and bench.png.")] = None,
    fill_seconds: Annotated[float, typer.Option(help="Longer prefills are replaced by synthetic states.")] = 60.0,
    temperature: Annotated[float, typer.Option(help="serving: of every request; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="serving: 0 keeps every token.")] = 0,
    top_p: Annotated[float, typer.Option(help="serving: 1 keeps every token.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="serving: 0 keeps every token.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="serving: 1 is none.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="serving: 0 is none.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="serving: 0 is none.")] = 0.0,
    logprobs: Annotated[int | None, typer.Option(help="serving: of each token and of so many likely ones.")] = None,
    mixed_prefill: Annotated[
        int | None, typer.Option(help="serving: prompt tokens of a step that also decodes.")
    ] = None,
    trusted_key: TrustedKey = None,
) -> None:
    """Measure speed and memory, beside the roofline; verified first, and nothing is timed where that fails."""
    from jet_export.bench.command import BenchOptions, run_bench
    from jet_export.bench.protocols import Asked, parse_batches, parse_contexts
    from jet_export.runtime.params import Params
    from jet_export.runtime.sampling import Sampling

    if new_tokens < 2:
        raise JetExportError(f"--new-tokens {new_tokens}: must be at least 2.")
    asked = Asked(
        protocol=protocol,
        contexts=parse_contexts(contexts),
        batches=parse_batches(batch),
        new_tokens=new_tokens,
        params=Params(
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logprobs=logprobs,
        ),
        mixed_prefill=mixed_prefill,
    )
    options = BenchOptions(
        bundle=bundle, asked=asked, baselines=tuple(baseline or ()), output=output, fill_seconds=fill_seconds
    )
    run_bench(options, command_line(), typer.echo)
