"""`jet-export bench`: verifies, measures, compares with baselines, prints and writes the results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from jet_export.backends.load import load_engine
from jet_export.bench import picture, report
from jet_export.bench.measure import DROPPED, Case, check_case
from jet_export.bench.prompt_calls import PromptCall, describe, measure_prompt_calls
from jet_export.bench.protocols import PROTOCOLS, Asked, Room, Skipped, plan_cases, skip, wanted
from jet_export.bench.ratios import SHAPED, Ratio, headline
from jet_export.bench.roofline import Peaks, Roofline, bundle_weights, measure_peaks, product_dtypes
from jet_export.bench.rows import Row, Subject, precision_of
from jet_export.bench.serving import ServingRow, serve_burst
from jet_export.bench.verified import Verdict, require_verified
from jet_export.bundle.dtypes import dtype_name
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.bundle.memory import available_memory, free_cached
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.utils.environment import environment, shown_command
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import check_directory, sha256_file, write_atomically
from jet_export.utils.progress import Progress

Emit = Callable[[str], None]
SWEEP_TOKENS = 40  # decode steps of a sweep's case, with the dropped ones


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The command line's options, one to one."""

    bundle: Path
    asked: Asked
    baselines: tuple[str, ...] = ()  # preset names or bundles
    output: Path | None = None
    fill_seconds: float = 60.0


@dataclass(kw_only=True)
class BundleRun:
    """One bundle's results."""

    bundle: Path
    manifest: Manifest
    verdict: Verdict
    peaks: Peaks
    load_seconds: float  # engine and weights, with the check of the files
    rows: list[Row] = field(default_factory=list)
    prompt_calls: list[PromptCall] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    serving: list[ServingRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        m = self.manifest
        return {
            "bundle": str(self.bundle),
            "manifest_sha256": sha256_file(self.bundle / "manifest.json"),
            "model": m.model["name"],
            "backend": m.backend,
            "quantized": bool(m.fp8_layers),
            "dtypes": {"model": m.dtype, "kv_cache": m.kv_cache_dtype, "state": m.state_dtype},
            "limits": asdict(m.limits),
            "build_command": m.rebuild_command,
            "verify": {"passed": self.verdict.passed, "date": self.verdict.date},
            "load_seconds": round(self.load_seconds, 2),
            "copy_bytes_per_s": self.peaks.copy,
            "matmul_flop_per_s": {dtype_name(d): s for d, s in self.peaks.matmul.items()},
            "rows": [asdict(r) for r in self.rows],
            "prompt_calls": [asdict(c) for c in self.prompt_calls],
            "serving": [asdict(r) for r in self.serving],
            "skipped": [asdict(s) for s in self.skipped],
            "notes": self.notes,
        }


def run_bench(options: BenchOptions, command: list[str], emit: Emit) -> dict[str, Any]:
    """Measure and print; returns the content of bench.json. Raises JetExportError for invalid options and for a bundle
    that fails verification, before anything is timed; and where every case was skipped."""
    if options.asked.protocol not in PROTOCOLS:
        raise JetExportError(
            f"--protocol {options.asked.protocol}: not known.", f"Known: {', '.join(sorted(PROTOCOLS))}."
        )
    if options.asked.protocol != "serving" and (options.asked.params, options.asked.mixed_prefill) != (Params(), None):
        raise JetExportError(
            f"--protocol {options.asked.protocol} decodes greedily, without a scheduler: no sampling options, no "
            "--mixed-prefill.",
            "Pass --protocol serving.",
        )
    manifest = Manifest.load(options.bundle)
    wanted(options.asked, manifest.limits)
    interval = manifest.state_interval
    if options.asked.new_tokens <= interval > 1 and options.asked.protocol != "serving":
        raise JetExportError(
            f"--new-tokens {options.asked.new_tokens}: the bundle writes its states every {interval} tokens, and "
            "decode is timed over whole intervals.",
            f"Pass --new-tokens {interval + SWEEP_TOKENS} or more.",
        )
    if options.output is not None:
        check_directory(options.output)
    baselines = [baseline_bundle(name, manifest, emit) for name in options.baselines]
    result: dict[str, Any] = {"environment": environment(), "command": shown_command(command)}
    result["protocol"] = options.asked.protocol

    def save(**parts: Any) -> None:
        result.update(parts)
        if options.output is not None:
            write_atomically(options.output / "bench.json", json.dumps(result, indent=1) + "\n")

    sweep = bool(baselines)
    ours = run_bundle(options, options.bundle, sweep, emit, lambda r: save(bundles=[r.to_dict()]))
    runs = [ours]
    ratios: list[Ratio] = []
    for bundle in baselines:
        runs.append(run_bundle(options, bundle, sweep, emit, lambda r: None))
        ratios += headline(ours.rows, runs[-1].rows)
        save(bundles=[r.to_dict() for r in runs], ratios=[asdict(r) for r in ratios])
    if not any(r.rows or r.serving for r in runs):
        skipped = dict.fromkeys(line for r in runs for line in report.skipped_lines(r.skipped))
        raise JetExportError("bench: no case could be measured.", "\n".join(skipped))
    save(bundles=[r.to_dict() for r in runs], ratios=[asdict(r) for r in ratios], complete=True)
    show(runs, ratios, emit)
    if options.output is not None:
        write_files(options.output, runs, result, emit)
    return result


def run_bundle(
    options: BenchOptions, bundle: Path, sweep: bool, emit: Emit, keep: Callable[[BundleRun], None]
) -> BundleRun:
    """Verify and measure one bundle. `keep` is called with the results so far after every case."""
    subject, run = load_subject(bundle, emit)
    cases, run.skipped, run.notes = plan_cases(options.asked, subject.room)
    if options.asked.protocol == "serving":
        with Progress(emit).stage("measure", len(cases), lines=False) as stage:
            for case in cases:
                run.serving.append(serve_case(subject, case, options.asked))
                keep(run)
                stage.advance()
        return run
    cases = with_sweep(cases, run.skipped, subject.room, options.asked.new_tokens) if sweep else cases
    with Progress(emit).stage("measure", len(cases), lines=False) as stage:
        for case in cases:
            try:
                run.rows.append(subject.measure(case, options.fill_seconds, emit))
            except torch.OutOfMemoryError:
                run.skipped.append(skip(case, "out of memory", "a smaller --batch"))
            keep(run)
            stage.advance()
    if run.rows:
        run.prompt_calls = measure_prompt_calls(subject.engine, max(r.chunk for r in run.rows))
        emit(f"  {describe(run.prompt_calls)}")
        keep(run)
    del subject
    free_cached(run.manifest.device)
    return run


def load_subject(bundle: Path, emit: Emit) -> tuple[Subject, BundleRun]:
    """A verified bundle, loaded, and the device's speeds; its results are still to come."""
    verdict = require_verified(bundle, emit)
    begin = time.monotonic()
    engine, manifest = load_engine(bundle)  # checks the files' hashes too: the verdict may be an older one
    load_seconds = time.monotonic() - begin
    weights = bundle_weights(bundle)
    free_cached(engine.device)  # left over from verify
    available = available_memory(engine.device) + weights.resident
    room = Room.of(manifest, weights=weights.resident, available=available)
    peaks = measure_peaks(engine.device, product_dtypes(manifest))
    emit(
        f"loaded in {load_seconds:.1f} s; copy {peaks.copy / 1e9:,.1f} GB/s, products "
        + ", ".join(f"{dtype_name(d)} {s / 1e12:.3g} TFLOP/s" for d, s in peaks.matmul.items())
    )
    roofline = Roofline(config=engine.config, dtype=engine.dtype, specs=engine.specs, weights=weights, peaks=peaks)
    run = BundleRun(bundle=bundle, manifest=manifest, verdict=verdict, peaks=peaks, load_seconds=load_seconds)
    return Subject(bundle=bundle, engine=engine, room=room, roofline=roofline), run


def serve_case(subject: Subject, case: Case, asked: Asked) -> ServingRow:
    """A burst of requests in as many slots as the case has sequences."""
    return serve_burst(
        subject.engine,
        load_tokenizer(subject.bundle),
        context=case.context,
        new_tokens=case.new_tokens,
        slots=case.batch,
        params=asked.params,
        mixed_prefill=asked.mixed_prefill,
    )


def with_sweep(cases: Sequence[Case], skipped: Sequence[Skipped], room: Room, new_tokens: int) -> list[Case]:
    """The cases, and at each context every power of two of sequences up to the largest batch that fits, on synthetic
    states: ratios at equal batch and at equal time per token need them. Contexts where only the protocol's own batch
    does not fit are swept too."""
    out = list(cases)
    asked = [(c.context, c.chunk) for c in cases] + [(s.context, s.chunk) for s in skipped]
    for context, chunk in dict.fromkeys(asked):
        steps = min(new_tokens, max(SWEEP_TOKENS, DROPPED + room.manifest.state_interval))
        one = Case(batch=1, context=context, chunk=chunk, new_tokens=steps, fill="synthetic")
        if check_case(one, room.manifest.limits) is not None:
            continue
        have = {c.batch for c in cases if c.context == context}
        most = min(room.largest(context + new_tokens, chunk), room.manifest.limits.max_batch_size)
        batches = {2**i for i in range(most.bit_length())} | {most}
        out += [replace(one, batch=b) for b in sorted(batches - have - {0})]
    return out


def baseline_bundle(name: str, like: Manifest, emit: Emit) -> Path:
    """A baseline's bundle: a directory as it is; "MODEL" and "MODEL:fp8" are built with the limits of `like`, and
    sum FP8 products as it does."""
    path = Path(name)
    if (path / "manifest.json").is_file():
        return path
    from jet_export.build.build import run_build
    from jet_export.build.plan import BuildOptions, make_plan

    model, _, precision = name.partition(":")
    if model not in SHAPED or precision not in ("", "bf16", "fp8"):
        raise JetExportError(
            f"--baseline {name}: neither a bundle nor a baseline.", f"Known: {', '.join(SHAPED)}, with :fp8 for FP8."
        )
    limits: Limits = like.limits
    backend = like.backend["name"]
    fast = like.fast_accumulation and precision == "fp8"
    sizes = f"b{limits.max_batch_size}-s{limits.max_seq_len}-c{limits.prefill_chunk}"
    output = Path("bundles") / f"{model}-{precision or 'bf16'}-{backend}-{sizes}{'-fast' if fast else ''}"
    options = BuildOptions(
        model=model,
        backend=backend,
        device=like.device.type,
        fp8=precision == "fp8",
        fast_accumulation=fast,
        random_weights=True,
        output=output,
        **asdict(limits),
    )
    command = (
        f"jet-export build --model {model} --random-weights --backend {backend} --device {like.device.type} "
        f"--max-batch-size {limits.max_batch_size} --max-seq-len {limits.max_seq_len} "
        f"--prefill-chunk {limits.prefill_chunk} --output {output}"
    )
    emit(f"baseline: {SHAPED[model]}, random weights, {precision or 'bf16'}: {output}")
    flags = [*(["--fp8"] if options.fp8 else []), *(["--fast-accumulation"] if fast else [])]
    return run_build(make_plan(options), [*command.split(), *flags], emit)


def show(runs: Sequence[BundleRun], ratios: Sequence[Ratio], emit: Emit) -> None:
    """Print tables, notes and skipped cases."""
    from jet_export.utils.console import console

    out = console()
    out.width = max(out.width, 180)
    rows = [r for run in runs for r in run.rows]
    if rows:
        out.print(report.table(rows))
    if serving := serving_rows(runs):
        out.print(report.serving_table(serving))
    for line in [*report.footnotes(rows), *(n for run in runs for n in run.notes)]:
        emit(line)
    for line in dict.fromkeys(line for run in runs for line in report.skipped_lines(run.skipped)):
        emit(line)
    if ratios:
        out.print(report.ratio_table(ratios))
        for line in dict.fromkeys(f"{r.baseline}, {r.kind}, context {r.context}: {r.why}" for r in ratios if r.why):
            emit(line)


def serving_rows(runs: Sequence[BundleRun]) -> list[tuple[str, str, ServingRow]]:
    """The rows of all bundles, each with its model and precision."""
    return [(run.manifest.model["name"], precision_of(run.manifest), r) for run in runs for r in run.serving]


def write_files(directory: Path, runs: Sequence[BundleRun], result: dict[str, Any], emit: Emit) -> None:
    """Write bench.csv and bench.png beside bench.json; the serving protocol has no picture."""
    rows = [r for run in runs for r in run.rows]
    written = ["bench.json"]
    if rows:
        report.write_csv(directory / "bench.csv", rows)
        written.append("bench.csv")
        try:
            picture.draw(directory / "bench.png", rows, result["environment"])
            written.append("bench.png")
        except JetExportError as e:
            emit(str(e))
    elif serving := serving_rows(runs):
        report.write_serving_csv(directory / "bench.csv", serving)
        written.append("bench.csv")
    emit(f"written: {', '.join(str(directory / name) for name in written)}")
