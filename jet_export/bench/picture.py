"""The picture that bench writes: throughput against context length."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jet_export.bench.ratios import SHAPED
from jet_export.bench.references import Reference, references_of
from jet_export.bench.rows import Row
from jet_export.utils.errors import JetExportError

MOST_LINES = 12  # more cannot be told apart


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises JetExportError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise JetExportError("no picture: matplotlib is not installed.", "pip install 'jet-export[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(path: Path, rows: Sequence[Row], environment: dict[str, str]) -> None:
    """Draw the lines of `series` for decode and prefill, and references as marks, each labelled with its source. The
    title names models, device, versions, date and commit."""
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
        wrapped = [textwrap.fill(label, 78, subsequent_indent="    ") for label in labels]  # as wide as the axes
        axis.legend(handles, wrapped, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    e = environment
    device = f"GPU {e['gpu']}" if e["gpu"] != "none" else f"CPU {e.get('cpu', '')}"
    figure.suptitle(f"{', '.join(sorted(models))}: {device}, torch {e['torch']}, {e['date']}, commit {e['commit']}")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def scale_speeds(axis: Any) -> None:
    """Scale the axis from 0 where speeds are within a factor of ten, else logarithmically; ticks are plain numbers."""
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
    """Label -> (context, tokens/s) by context; one line for each model, precision and batch. Where that makes more than
    MOST_LINES, two for each model and precision: batch 1, and the largest batch measured at each context."""
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
