"""The steps of `jet-export try`: plans, builds, the reference of the ten prompts, and each bundle's measurements."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jet_export.backends.eager import EagerEngine
from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, BuildPlan, make_plan
from jet_export.build.steps import check_requirements, load_model
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import free_cached
from jet_export.bundle.target import target_device
from jet_export.model.hub import resolve_checkpoint
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.tryout.measure import Subject
from jet_export.tryout.outputs import NEW_TOKENS, Outputs, run_prompts
from jet_export.tryout.prompts import PROMPTS
from jet_export.tryout.published import Published
from jet_export.tryout.report import NOT_RUN, Emit, Report
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import check_directory

PRECISIONS = ("fp8", "bf16")


@dataclass(frozen=True, kw_only=True)
class TryOptions:
    """The command line's options, one to one."""

    model: str
    output: Path
    checkpoint: Path | None = None
    random_weights: bool = False
    precisions: tuple[str, ...] = PRECISIONS
    backend: str = "inductor"
    device: str = "auto"
    max_batch_size: int | None = None  # 32 on a GPU, 4 on a CPU
    max_seq_len: int | None = None  # 8192 on a GPU, 1024 on a CPU, at most the model's
    published: Published = field(default_factory=Published)


def run_try(o: TryOptions, command: list[str], emit: Emit) -> dict[str, Any]:
    """Run every step and write the report and the page to `o.output`. Returns the report, whose `failures` are the
    steps that failed. Raises JetExportError for invalid options, before anything runs."""
    plans, refused = plans_of(o)
    check_directory(o.output)
    work = o.output / "outputs"
    work.mkdir(parents=True, exist_ok=True)
    report = Report(o.output, o.model, command, emit)
    for precision, why in refused.items():
        report.not_run(precision, why)
    reference: Outputs | None = None
    for precision, plan in plans.items():
        bundle = report.step(f"{precision}: build", lambda plan=plan: run_build(plan, command_of(plan), emit))  # type: ignore[misc]
        if bundle is None:
            continue
        prompts = encoded(bundle, plan)
        if reference is None:
            reference = reference_outputs(report, o, plan, prompts)
        figures = report.values["precisions"].setdefault(precision, {"bundle": str(bundle)})
        Subject(bundle=bundle, precision=precision, prompts=prompts, reference=reference, figures=figures).run(report)
        free_cached(plan.build_device)
    report.save()
    return report.values


def plans_of(o: TryOptions) -> tuple[dict[str, BuildPlan], dict[str, str]]:
    """A plan for each precision that can be built here, and why the others cannot. Raises JetExportError where none
    can."""
    unknown = [p for p in o.precisions if p not in PRECISIONS]
    if unknown or not o.precisions:
        raise JetExportError(f"--precision {','.join(o.precisions)}: not known.", f"Known: {', '.join(PRECISIONS)}.")
    gpu = target_device(o.device).type == "cuda"
    plans, refused = dict[str, BuildPlan](), dict[str, str]()
    for precision in o.precisions:
        options = BuildOptions(
            model=o.model,
            checkpoint=o.checkpoint,
            backend=o.backend,
            device=o.device,
            fp8=precision == "fp8",
            random_weights=o.random_weights,
            max_batch_size=o.max_batch_size or (32 if gpu else 4),
            max_seq_len=o.max_seq_len,
            output=o.output / "bundles" / precision,
        )
        try:
            plan = make_plan(options)
            if o.max_seq_len is None:
                length = min(8192 if gpu else 1024, plan.config.max_position_embeddings)
                plan = make_plan(replace(options, max_seq_len=length))
            check_requirements(plan)
            plans[precision] = plan
        except JetExportError as e:
            refused[precision] = str(e).replace("\n", " ")
            if precision == o.precisions[-1] and not plans:
                raise
    return plans, refused


def command_of(plan: BuildPlan) -> list[str]:
    """The `jet-export build` command that makes the plan's bundle."""
    o = plan.options
    words = ["jet-export", "build", "--model", o.model, "--backend", o.backend, "--device", o.device]
    words += ["--fp8"] if o.fp8 else []
    words += ["--checkpoint", str(o.checkpoint)] if o.checkpoint else []
    words += ["--random-weights"] if o.random_weights else []
    words += ["--max-batch-size", str(o.max_batch_size), "--max-seq-len", str(o.max_seq_len)]
    return [*words, "--output", str(plan.output)]


def encoded(bundle: Path, plan: BuildPlan) -> list[list[int]]:
    """The ten prompts as token ids, as many as fit; as bytes for a model without a tokenizer."""
    tokenizer, most = load_tokenizer(bundle), plan.limits.max_seq_len - NEW_TOKENS
    return [[min(i, plan.config.vocab_size - 1) for i in tokenizer.encode(p)][:most] for p in PROMPTS]


def reference_outputs(report: Report, o: TryOptions, plan: BuildPlan, prompts: list[list[int]]) -> Outputs | None:
    """The published code's outputs, where transformers can run it; else the PyTorch model's, not quantised."""
    directory = None if o.random_weights else plan.directory
    why = o.published.why_not(plan.config, directory)
    if why is None:
        found = report.step("published code", lambda: published_outputs(o, plan, prompts))
        if isinstance(found, Outputs):
            report.values["reference"] = found.how
            return found
        if found is not None:
            report.values["steps"][-1] |= {"status": NOT_RUN, "why": found}
            report.emit(f"   not run: {found}")
    else:
        report.not_run("published code", why)
    report.values["reference"] = "the PyTorch model here, bf16, not quantised"
    return report.step("PyTorch model", lambda: eager_outputs(plan, prompts, report.values["reference"]))


def published_outputs(o: TryOptions, plan: BuildPlan, prompts: list[list[int]]) -> Outputs | str:
    directory = plan.directory
    if o.checkpoint is None and plan.source.startswith("hub"):
        directory = resolve_checkpoint(o.model, code=True)
    assert directory is not None
    return o.published.run(directory, prompts, o.output / "outputs", plan.build_device.type)


def eager_outputs(plan: BuildPlan, prompts: list[list[int]], how: str) -> Outputs:
    length = max(map(len, prompts)) + NEW_TOKENS
    limits = Limits(max_batch_size=1, max_seq_len=length, prefill_chunk=length)
    engine = EagerEngine(load_model(plan), limits)
    tokenizer = load_tokenizer(plan.output)
    out = run_prompts(LLM.over(engine, tokenizer, plan.config.eos_token_id), prompts, how)
    del engine
    free_cached(plan.build_device)
    return out
