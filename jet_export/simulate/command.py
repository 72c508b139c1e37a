"""`jet-export simulate`: reads the options, runs the load, writes result.json, requests.csv and report.html."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jet_export.runtime.capacity import Serving
from jet_export.simulate.choose import fewest
from jet_export.simulate.cluster import Autoscale, Cluster, ClusterPlan, Failures, Outcome
from jet_export.simulate.engine import PlannedEngine
from jet_export.simulate.load import Arrival, fitted
from jet_export.simulate.measures import Slo, summary, tpot, ttft
from jet_export.simulate.report import lines, page, terminal_table
from jet_export.simulate.step_times import FittedTimes
from jet_export.utils.console import console
from jet_export.utils.environment import environment, write_result
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically
from jet_export.utils.progress import Progress

RESULT, REPORT, REQUESTS = "result.json", "report.html", "requests.csv"


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What is asked for. replicas None: the fewest that meet `slo` for `share` of the requests."""

    engine: PlannedEngine
    serving: Serving
    load: Sequence[Arrival]
    load_name: str
    replicas: int | None
    slo: Slo | None
    share: float = 0.99
    router: str = "prefix"
    slack: int = 8
    autoscale: Autoscale | None = None
    failures: Failures | None = None
    step_overhead: float = 0.0  # seconds
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.replicas is None and self.slo is None:
            raise JetExportError("simulate --replicas auto: needs an SLO.", "For example: --slo ttft=500ms,tpot=30ms")
        if self.replicas is None and self.autoscale is not None:
            raise JetExportError("simulate: --replicas auto and --autoscale exclude each other.")
        if not 0 < self.share <= 1:
            raise JetExportError(f"simulate --share {self.share}: not a share of the requests.", "For example: 0.99")


def run_simulate(o: SimulateOptions, emit: Callable[[str], None]) -> dict[str, Any]:
    """Simulate, print and write; returns what result.json holds. Raises JetExportError."""
    load, longer = fitted(o.load, o.engine.limits.max_seq_len)
    if not load:
        raise JetExportError(
            f"simulate: no request of the load fits {o.engine.limits.max_seq_len} tokens.", "Raise --max-seq-len."
        )
    if longer:
        emit(f"{longer} requests are longer than {o.engine.limits.max_seq_len} tokens, and left out (--max-seq-len)")
    shared = any(a.session or a.blocks for a in load)
    serving = o.serving if shared else _without_cache(o.serving)
    model, fit = o.engine.model(serving, o.step_overhead)
    c = model.capacity
    emit(
        f"{o.engine.name} {o.engine.precision}: {c.slots} sequences at once, {c.pages} KV pages of {c.page_size}, "
        f"{c.token_budget} tokens a step, {c.prefix_rows} prefixes; {len(load):,} requests over {load[-1].at:,.1f} s"
    )
    for line in fit.lines():
        emit(line)
    plan = ClusterPlan(
        replicas=o.replicas or 1, router=o.router, slack=o.slack, autoscale=o.autoscale, failures=o.failures
    )
    tried: list[Any] = []
    if o.replicas is None:
        assert o.slo is not None
        _, outcome, tried = fewest(model, plan, load, o.slo, o.share, emit)
    else:
        with Progress(emit).stage("simulate", len(load)) as stage:
            outcome = Cluster(model, plan).serve(load, stage.at)
    figures = summary(outcome, o.slo)
    gaps = _gaps(fit, load, outcome)
    for line in (*lines(figures), *gaps):
        emit(line)
    console().print(terminal_table(figures))
    result = {
        "engine": f"{o.engine.name} {o.engine.precision} on {o.engine.table.device}",
        "options": _options(o, c.slots, c.pages),
        "fit": fit.lines(),
        "gaps": gaps,
        "tried": [asdict(t) for t in tried],
        "summary": figures,
    }
    if o.output is not None:
        _write(o.output, result, outcome)
        emit(f"written: {o.output / REPORT}")
    return result


def _without_cache(serving: Serving) -> Serving:
    """No prompt of the load begins like another: looking for them takes time and finds nothing."""
    from dataclasses import replace

    return replace(serving, prefix_cache_bytes=0)


def _gaps(fit: FittedTimes, load: Sequence[Arrival], outcome: Outcome) -> list[str]:
    longest = max(a.prompt + a.output for a in load)
    return fit.gaps(sequences=outcome.most_at_once, context=longest, prompt=max(a.prompt for a in load))


def _options(o: SimulateOptions, slots: int, pages: int) -> dict[str, Any]:
    named = {
        "load": o.load_name,
        "replicas": o.replicas or "auto",
        "slo": str(o.slo) if o.slo else None,
        "share": o.share if o.replicas is None else None,
        "router": o.router,
        "autoscale": str(asdict(o.autoscale)) if o.autoscale else None,
        "failures": str(asdict(o.failures)) if o.failures else None,
        "step overhead, us": 1e6 * o.step_overhead or None,
        "sequences at once": slots,
        "KV pages": pages,
    }
    return {**named, **{f"limit: {k}": v for k, v in asdict(o.engine.limits).items()}}


def _write(output: Path, result: dict[str, Any], outcome: Outcome) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_result(output / RESULT, result)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(
        ["arrival_s", "prompt", "output", "session", "cached", "ttft_s", "tpot_s", "end_s", "failed", "tries"]
    )
    for j in outcome.jobs:
        a, good = j.arrival, not j.failed
        times = [f"{ttft(j):.6f}", f"{tpot(j) or 0:.6f}"] if good else ["", ""]
        rows.writerow(
            [f"{a.at:.6f}", a.prompt, a.output, a.session, j.cached, *times, f"{j.end:.6f}", j.failed, j.tries]
        )
    write_atomically(output / REQUESTS, text.getvalue())
    write_atomically(output / REPORT, page(result, outcome, environment()))
