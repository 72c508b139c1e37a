"""What bench prints and writes: tables, CSV, and a picture of throughput against context length."""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from jet_export.bench.protocols import Skipped
from jet_export.bench.ratios import SHAPED, Ratio
from jet_export.bench.references import PAPER_DECODE_RATIO, PAPER_PREFILL_RATIO, Reference, references_of
from jet_export.bench.rows import Row
from jet_export.bench.serving import ServingRow
from jet_export.utils.console import human
from jet_export.utils.errors import JetExportError

MOST_LINES = 12  # of a picture; more cannot be told apart


def table(rows: Sequence[Row]) -> Table:
    """A row a case; "of roof": share of what the roofline allows."""
    out = Table(box=None, header_style="bold")
    names = ("model", "context", "batch", "prefill tok/s", "of roof", "decode tok/s", "ms/token", "p90", "of roof",
             "TTFT p50", "p99", "memory", "filled by")  # fmt: skip
    for name in names:
        out.add_column(name, justify="left" if name in ("model", "filled by") else "right", no_wrap=True)
    for r in rows:
        out.add_row(
            f"{SHAPED.get(r.model, r.model)} {r.precision}", str(r.context) + ("*" if r.throughput_only else ""),
            str(r.batch), f"{r.prefill_tokens_per_s:,.0f}", f"{r.prefill_of_roofline:.0%}",
            f"{r.decode_tokens_per_s:,.0f}", f"{r.ms_per_token:.3g}", f"{r.ms_per_token_p90:.3g}",
            f"{r.decode_of_roofline:.0%}", milliseconds(r.ttft_p50), milliseconds(r.ttft_p99),
            human(r.memory_peak or r.memory_predicted) + ("" if r.memory_peak else " pred."), r.filled_by,
        )  # fmt: skip
    return out


def serving_table(rows: Sequence[tuple[str, str, ServingRow]]) -> Table:
    """A row a burst of requests; new tokens/s of all of them together, ms/token of one."""
    out = Table(box=None, header_style="bold")
    names = ("model", "context", "new tokens", "requests", "slots", "new tok/s", "TTFT p50", "p99", "ms/token", "p99")
    for name in names:
        out.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for model, precision, r in rows:
        out.add_row(
            f"{SHAPED.get(model, model)} {precision}", str(r.context), str(r.new_tokens), str(r.requests), str(r.slots),
            f"{r.tokens_per_s:,.0f}", milliseconds(r.ttft_p50), milliseconds(r.ttft_p99),
            f"{r.ms_per_token_p50:.3g}", f"{r.ms_per_token_p99:.3g}",
        )  # fmt: skip
    return out


def milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def footnotes(rows: Sequence[Row]) -> list[str]:
    notes = []
    if any(r.throughput_only for r in rows):
        notes.append("* beyond the model's positions: throughput only, the text means nothing there")
    if any(r.filled_by == "synthetic" for r in rows):
        notes.append(
            "synthetic: states made of noise instead of prefilled; prefill speed from calls at both ends of the context"
        )
    few = [r for r in rows if 0 < r.ttft_samples < 100]
    if few:
        notes.append(f"TTFT of {min(r.ttft_samples for r in few)} or more samples a row: p99 is the largest of them")
    return notes


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """Cases that one build would allow share a line."""
    groups: dict[tuple[int, int, str, str], list[int]] = {}
    for s in skipped:
        groups.setdefault((s.context, s.chunk, s.reason, s.remedy), []).append(s.batch)
    return [
        f"skipped: context {context}, batch {', '.join(map(str, batches))}, chunk {chunk}: {reason}\n  {remedy}"
        for (context, chunk, reason, remedy), batches in groups.items()
    ]


def ratio_table(ratios: Sequence[Ratio]) -> Table:
    out = Table(box=None, header_style="bold")
    names = (
        "",
        "at",
        "context",
        "batch",
        "tok/s",
        "baseline",
        "its batch",
        "its tok/s",
        "of its roof",
        "ratio",
        "paper",
    )
    for name in names:
        out.add_column(name, justify="left" if name in ("", "at", "baseline") else "right", no_wrap=True)
    for r in ratios:
        paper = (PAPER_DECODE_RATIO if r.kind == "decode" else PAPER_PREFILL_RATIO).get(r.context)
        out.add_row(
            r.kind, r.at, str(r.context) + ("*" if r.throughput_only else ""), str(r.batch), f"{r.tokens_per_s:,.0f}",
            r.baseline, str(r.baseline_batch), f"{r.baseline_tokens_per_s:,.0f}", f"{r.baseline_of_roofline:.0%}",
            f"{r.ratio:.2f}x" if r.ratio is not None else "not quoted", f"{paper}x" if paper else "",
        )  # fmt: skip
    return out


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line a row; the bytes of a step as columns."""
    records = []
    for r in rows:
        record = asdict(r)
        record.update({f"step_bytes_{k}": v for k, v in record.pop("step_bytes").items()})
        records.append(record)
    _write_records(path, records)


def write_serving_csv(path: Path, rows: Sequence[tuple[str, str, ServingRow]]) -> None:
    """A line a row: model, precision and its figures."""
    _write_records(path, [{"model": model, "precision": precision, **asdict(r)} for model, precision, r in rows])


def _write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    names = list(records[0])
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(records)


def pyplot() -> Any:
    """matplotlib's, drawing to files. Raises JetExportError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise JetExportError("no picture: matplotlib is not installed.", "pip install 'jet-export[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(path: Path, rows: Sequence[Row], environment: dict[str, str]) -> None:
    """Decode and prefill tokens/s against context, the lines of `series`; references as marks, each labelled with its
    source. What was measured where stands under the title."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5))
    models = {r.model for r in rows}
    references = [x for model in sorted(models) for x in references_of(model)]
    for axis, kind in zip(axes, ("decode", "prefill"), strict=True):
        for label, points in series(rows, kind).items():
            xs, ys = zip(*points, strict=True)
            axis.plot(xs, ys, marker="o", label=label)
        for x in references:
            if x.kind == kind:
                _mark(axis, x)
        axis.set_xscale("log", base=2)
        scale_speeds(axis)
        contexts = sorted({r.context for r in rows} | {x.context for x in references if x.context and x.kind == kind})
        axis.set_xticks(contexts, [f"{c // 1024}K" if c % 1024 == 0 else str(c) for c in contexts], fontsize=8)
        axis.xaxis.minorticks_off()
        axis.set_xlabel("context, tokens")
        axis.set_ylabel(f"{kind}, tokens/s, all sequences together")
        axis.grid(True, which="both", alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        wrapped = [textwrap.fill(label, 78, subsequent_indent="    ") for label in labels]  # as wide as its axes
        axis.legend(handles, wrapped, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    e = environment
    device = f"GPU {e['gpu']}" if e["gpu"] != "none" else f"CPU {e.get('cpu', '')}"
    figure.suptitle(f"{', '.join(sorted(models))}: {device}, torch {e['torch']}, {e['date']}, commit {e['commit']}")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def scale_speeds(axis: Any) -> None:
    """Speeds from 0 where they are within a factor of ten, else their logarithms; with numbers either way."""
    low, high = axis.dataLim.intervaly
    if high < 10 * low:
        axis.set_ylim(0, 1.05 * high)
        ticks = axis.get_yticks()
    else:
        axis.set_yscale("log")
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low / 2 <= m * 10.0**d <= 2 * high]
    axis.set_yticks(ticks, [f"{t:,.0f}" for t in ticks], fontsize=8)
    axis.yaxis.minorticks_off()


def series(rows: Sequence[Row], kind: str) -> dict[str, list[tuple[int, float]]]:
    """Label -> (context, tokens/s) by context; one line for each model, precision and batch. Where these are more than
    MOST_LINES, two for each model and precision: one sequence, and at each context the most that were measured."""
    named: dict[str, list[Row]] = {}
    for r in sorted(rows, key=lambda r: (r.context, r.batch)):
        named.setdefault(f"{SHAPED.get(r.model, r.model)} {r.precision}", []).append(r)
    lines: dict[str, list[Row]] = {}
    for name, all_batches in named.items():
        for r in all_batches:
            lines.setdefault(f"{name}, batch {r.batch}", []).append(r)
    if len(lines) > MOST_LINES:
        lines = {}
        for name, all_batches in named.items():
            largest = list({r.context: r for r in all_batches}.values())
            lines[f"{name}, largest batch ({', '.join(str(r.batch) for r in largest)})"] = largest
            if one := [r for r in all_batches if r.batch == 1]:
                lines[f"{name}, batch 1"] = one
    return {
        label: [(r.context, r.decode_tokens_per_s if kind == "decode" else r.prefill_tokens_per_s) for r in line]
        for label, line in lines.items()
    }


def _mark(axis: Any, reference: Reference) -> None:
    label = f"{reference.model}, batch {reference.batch}, {reference.tokens_per_s:,.0f} tokens/s: {reference.source}"
    if reference.context is None:
        axis.axhline(reference.tokens_per_s, linestyle="--", linewidth=1, label=label)
    else:
        axis.plot([reference.context], [reference.tokens_per_s], marker="x", linestyle="none", label=label)
