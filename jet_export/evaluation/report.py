"""What an evaluation found: a table for people, JSON, and the samples line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from jet_export.evaluation.compare import Estimate
from jet_export.evaluation.run import BundleOutcome, Evaluation
from jet_export.utils.environment import environment
from jet_export.utils.files import write_atomically


def table(e: Evaluation) -> Table:
    """A row for each metric of each task: value and standard error, and the paired difference to the baseline."""
    out = Table(box=None, header_style="bold")
    for column in ("task", "metric", "documents", e.bundle.directory.name):
        out.add_column(column, justify="left" if column in ("task", "metric") else "right")
    if e.baseline:
        for column in (f"{e.baseline.directory.name} (baseline)", "difference"):
            out.add_column(column, justify="right")
    for name, task in e.bundle.tasks.items():
        label = name
        for metric, values in task.metrics.items():
            better = e.higher_is_better.get(name, {}).get(metric)
            arrow = {True: " ↑", False: " ↓", None: ""}[better]
            row = [label, metric + arrow, str(len(values.values)), shown(values.estimate())]
            difference = e.difference(name, metric)
            if e.baseline and difference:
                row += [shown(e.baseline.tasks[name].metrics[metric].estimate()), shown(difference, signed=True)]
            out.add_row(*row)
            label = ""
        for metric, estimate in task.others.items():
            row = [label, metric, str(estimate.n), shown(estimate)]
            out.add_row(*row, *([shown(e.baseline.tasks[name].others[metric])] if e.baseline else []))
            label = ""
    return out


def shown(estimate: Estimate, signed: bool = False) -> str:
    """The value ± its standard error, with the digits that the error leaves."""
    sign = "+" if signed else ""
    if estimate.stderr is None:
        return f"{estimate.value:{sign}.4f}"
    return f"{estimate.value:{sign}.4f} ± {estimate.stderr:.4f}"


def remarks(e: Evaluation) -> list[str]:
    """What a reader of the table has to know."""
    lines = ["± is one standard error over documents" + (", of a difference a paired one." if e.baseline else ".")]
    for outcome in (e.bundle, e.baseline):
        if outcome:
            lines += [
                f"{outcome.directory.name}: {n} {kind} requests were too long and lost their beginning."
                for kind, n in outcome.truncated.items()
            ]
    lines.append(f"{e.bundle.tokens} prompt tokens in {e.bundle.seconds:.1f} s.")
    return lines


def to_dict(e: Evaluation, command: list[str]) -> dict[str, Any]:
    """Everything but the samples."""
    import lm_eval

    o = e.options
    return {
        "environment": environment(),
        "command": " ".join(command),
        "lm_eval": lm_eval.__version__,
        "limit": o.limit,
        "deterministic": o.deterministic,
        "bundle": _bundle(e.bundle),
        "baseline": _bundle(e.baseline) if e.baseline else None,
        "tasks": {name: _task(e, name) for name in e.bundle.tasks},
    }


def _bundle(b: BundleOutcome) -> dict[str, Any]:
    m = b.manifest
    return {
        "directory": str(b.directory),
        "fingerprint": m.fingerprint,
        "model": m.model["name"],
        "backend": m.backend["name"],
        "dtype": m.dtype,
        "kv_cache_dtype": m.kv_cache_dtype,
        "fp8": bool(m.fp8_layers),
        "max_seq_len": m.limits.max_seq_len,
        "prompt_tokens": b.tokens,
        "seconds": round(b.seconds, 3),
        "truncated": b.truncated,
        "groups": b.groups,
    }


def _task(e: Evaluation, name: str) -> dict[str, Any]:
    task = e.bundle.tasks[name]
    metrics = {}
    for metric, values in task.metrics.items():
        found: dict[str, Any] = _estimate(values.estimate())
        difference = e.difference(name, metric)
        if e.baseline and difference:
            found["baseline"] = _estimate(e.baseline.tasks[name].metrics[metric].estimate())
            found["difference"] = _estimate(difference)
        metrics[metric] = found
    for metric, estimate in task.others.items():
        metrics[metric] = _estimate(estimate)
        if e.baseline:
            metrics[metric]["baseline"] = _estimate(e.baseline.tasks[name].others[metric])
    return {"documents": task.documents, "metrics": metrics, "harness": task.harness}


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "stderr": estimate.stderr, "documents": estimate.n}


def write_json(path: Path, e: Evaluation, command: list[str]) -> None:
    write_atomically(path, json.dumps(to_dict(e, command), indent=1, default=str) + "\n")


def write_samples(path: Path, e: Evaluation) -> None:
    """JSON lines: bundle, task, and the sample as the harness has it."""
    lines = []
    for outcome in [e.bundle, *([e.baseline] if e.baseline else [])]:
        for name, task in outcome.tasks.items():
            lines += [
                json.dumps({"bundle": str(outcome.directory), "task": name, **s}, default=str, ensure_ascii=False)
                for s in task.samples
            ]
    write_atomically(path, "".join(f"{line}\n" for line in lines))
