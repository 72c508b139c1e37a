"""`jet-export eval`: tasks on a bundle and on a baseline, one after the other, and what came of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jet_export.bundle.manifest import Manifest
from jet_export.bundle.memory import free_cached
from jet_export.evaluation.compare import Estimate, Metric, paired
from jet_export.evaluation.progress import EvaluationProgress
from jet_export.evaluation.selection import load_tasks, quiet_harness
from jet_export.evaluation.tasks.settings import TaskSettings
from jet_export.runtime.llm import LLM
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    from lm_eval.api.model import LM

BOOTSTRAP = 1000  # resamples, for metrics whose standard error has no closed form


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is asked for."""

    bundle: Path
    tasks: tuple[str, ...]
    limit: int | None = None  # documents of each task
    baseline: Path | None = None
    lengths: tuple[int, ...] = ()  # tokens, of local tasks by length
    text: Path | None = None  # of local tasks over a text
    deterministic: bool = False

    @property
    def bundles(self) -> tuple[Path, ...]:
        return (self.bundle, self.baseline) if self.baseline else (self.bundle,)


@dataclass(kw_only=True)
class TaskOutcome:
    """A task on one bundle."""

    documents: int
    metrics: dict[str, Metric]  # functions of a mean over documents
    others: dict[str, Estimate]  # as the harness has them (F1, BLEU): without a paired difference
    harness: dict[str, Any]  # the harness's figures
    samples: list[dict[str, Any]]  # a document, its requests and the answers, each


@dataclass(kw_only=True)
class BundleOutcome:
    """All tasks on one bundle."""

    directory: Path
    manifest: Manifest
    tasks: dict[str, TaskOutcome]
    groups: dict[str, dict[str, Any]]  # the harness's figures
    truncated: dict[str, int]  # kind of request: how many lost their beginning
    tokens: int  # of all prompts
    seconds: float  # of the requests, without loading


@dataclass(kw_only=True)
class Evaluation:
    """Everything that was measured."""

    options: EvalOptions
    bundle: BundleOutcome
    baseline: BundleOutcome | None
    higher_is_better: dict[str, dict[str, bool]] = field(default_factory=dict)

    def difference(self, task: str, metric: str) -> Estimate | None:
        """The bundle's value less the baseline's; None without a baseline."""
        if self.baseline is None:
            return None
        return self.bundle.tasks[task].metrics[metric].minus(self.baseline.tasks[task].metrics[metric])


def run_evaluation(options: EvalOptions, emit: Callable[[str], None]) -> Evaluation:
    """Run the tasks. Everything that can be checked is checked before an engine is loaded.

    Raises JetExportError for bad options, tasks that do not exist, and bundles that cannot be loaded."""
    if options.limit is not None and options.limit < 1:
        raise JetExportError(f"--limit {options.limit}: not a number of documents.")
    manifests = [Manifest.load(d) for d in options.bundles]
    quiet_harness()
    shortest = min(m.limits.max_seq_len for m in manifests)
    settings = TaskSettings(
        bundle=str(options.bundle),
        max_length=shortest - 1,
        lengths=options.lengths,
        text=str(options.text) if options.text else "",
    )
    if options.text:
        settings.read_text()
    emit(f"tasks: {', '.join(options.tasks)}")
    loaded = load_tasks(options.tasks, settings, emit)
    outcomes = []
    with EvaluationProgress(emit) as progress:
        for directory, manifest in zip(options.bundles, manifests, strict=True):
            progress.label = directory.name
            outcomes.append(_on_bundle(directory, manifest, loaded, options, shortest, progress))
            free_cached(manifest.device)
    better = {name: dict(task.higher_is_better()) for name, task in loaded["tasks"].items()}
    return Evaluation(
        options=options,
        bundle=outcomes[0],
        baseline=outcomes[1] if options.baseline else None,
        higher_is_better=better,
    )


def _on_bundle(
    directory: Path,
    manifest: Manifest,
    loaded: dict[str, Any],
    options: EvalOptions,
    max_seq_len: int,
    progress: EvaluationProgress,
) -> BundleOutcome:
    """`max_seq_len`: of the bundle, or less."""
    from jet_export.evaluation.model import EngineLM, prefix_token

    llm = LLM(directory, deterministic=options.deterministic)
    model = EngineLM(llm, prefix_token(directory, llm.tokenizer, llm.eos), progress)
    model.max_length = max_seq_len - 1
    start = time.monotonic()
    tasks, groups = run_tasks(model, loaded, options.limit)
    return BundleOutcome(
        directory=directory,
        manifest=manifest,
        tasks=tasks,
        groups=groups,
        truncated={kind: n for kind, n in model.truncated.items() if n},
        tokens=model.tokens,
        seconds=time.monotonic() - start,
    )


def run_tasks(
    model: LM, loaded: dict[str, Any], limit: int | None
) -> tuple[dict[str, TaskOutcome], dict[str, dict[str, Any]]]:
    """(tasks by name, the harness's figures of groups by name). `loaded`: of `load_tasks`; may be used again."""
    from lm_eval.evaluator import evaluate

    results = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True)
    tasks = {name: _outcome(results["results"][name], results["samples"][name]) for name in loaded["tasks"]}
    return tasks, dict(results.get("groups", {}))


def _outcome(figures: Mapping[str, Any], samples: list[dict[str, Any]]) -> TaskOutcome:
    values: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = paired(sample[metric])
    outcome = TaskOutcome(
        documents=len({s["doc_id"] for s in samples}), metrics={}, others={}, harness=dict(figures), samples=samples
    )
    for (name, kept), found in values.items():
        label = name if kept == "none" else f"{name},{kept}"
        metric, figure = Metric(label, found), figures[f"{name},{kept}"]
        if None not in found.values() and math.isclose(metric.estimate().value, figure, rel_tol=1e-6, abs_tol=1e-9):
            outcome.metrics[label] = metric
        else:
            stderr = figures.get(f"{name}_stderr,{kept}")
            outcome.others[label] = Estimate(figure, stderr if isinstance(stderr, float) else None, len(found))
    return outcome
