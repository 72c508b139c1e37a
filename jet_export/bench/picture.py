"""The picture that bench writes: throughput against context length."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
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
    """Draw the lines of `series` for decode and prefill, each named at its end, and references as numbered marks, with
    their sources below. The title names models, device, versions, date and commit."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(15, 6))
    models = {r.model for r in rows}
    references = [x for model in sorted(models) for x in references_of(model)]
    sources = list(dict.fromkeys(x.source for x in references))
    for axis, kind in zip(axes, ("decode", "prefill"), strict=True):
        ends: list[Label] = []
        for label, points in series(rows, kind).items():
            xs, ys = zip(*points, strict=True)
            (line,) = axis.plot(xs, ys, marker="o", label=label)
            ends.append(Label(ys[-1], label, line.get_color()))
        of_kind = [x for x in references if x.kind == kind]
        ends += filter(None, [_mark(axis, x, sources.index(x.source) + 1) for x in of_kind])
        axis.set_xscale("log", base=2)
        scale_speeds(axis)
        contexts = sorted({r.context for r in rows} | {x.context for x in of_kind if x.context})
        axis.set_xticks(contexts, [f"{c // 1024}K" if c % 1024 == 0 else str(c) for c in contexts], fontsize=8)
        axis.xaxis.minorticks_off()
        axis.set_xlabel("context, tokens")
        axis.set_title(f"{kind}, tokens/s, all sequences together", fontsize=10, loc="left")
        axis.grid(True, which="both", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        name_ends(axis, ends)
    e = environment
    device = f"GPU {e['gpu']}" if e["gpu"] != "none" else f"CPU {e.get('cpu', '')}"
    figure.suptitle(f"{', '.join(sorted(models))}: {device}, torch {e['torch']}, {e['date']}, commit {e['commit']}")
    figure.subplots_adjust(wspace=0.5)
    notes = "\n".join(f"({i}) {source}" for i, source in enumerate(sources, 1))
    figure.text(0.125, 0.0, notes, fontsize=8, va="top")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


@dataclass(frozen=True)
class Label:
    """The name of a line. `y`: where it ends, in the axis's units."""

    y: float
    text: str
    colour: Any


def name_ends(axis: Any, labels: Sequence[Label], spacing: float = 24.0) -> None:
    """Write the names to the right of the axis, at the height of their ends but at least `spacing` pixels apart, with a
    thin line to each."""
    axis.get_ylim()  # settles the limits, on which the transformations rest
    low = axis.transAxes.transform((0, 0))[1]
    ordered = sorted(labels, key=lambda label: label.y)
    heights: list[float] = []
    for label in ordered:
        end = axis.transData.transform((1, label.y))[1]
        heights.append(max(end, heights[-1] + spacing if heights else low))
    to_data = axis.transData.inverted()
    for label, height in zip(ordered, heights, strict=True):
        axis.annotate(
            textwrap.fill(label.text, 36),
            xy=(1.0, label.y),
            xycoords=("axes fraction", "data"),
            xytext=(1.05, to_data.transform((0, height))[1]),
            textcoords=("axes fraction", "data"),
            color=label.colour,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )


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


def _mark(axis: Any, reference: Reference, source: int) -> Label | None:
    """Draws it. A speed at one context is named beside its mark; one without a context is a line, whose name is
    returned."""
    text = f"{reference.tokens_per_s:,.0f} at B{reference.batch} ({source})"
    if reference.context is None:
        line = axis.axhline(reference.tokens_per_s, linestyle="--", linewidth=1, color="dimgrey")
        return Label(reference.tokens_per_s, text, line.get_color())
    at = (reference.context, reference.tokens_per_s)
    axis.plot(*at, marker="x", linestyle="none", color="dimgrey")
    axis.annotate(text, at, xytext=(5, -9), textcoords="offset points", fontsize=7.5, color="dimgrey")
    return None
