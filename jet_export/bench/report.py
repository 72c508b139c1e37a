"""The tables and notes that bench prints, and its CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from jet_export.bench.protocols import Skipped
from jet_export.bench.ratios import SHAPED, Ratio
from jet_export.bench.references import PAPER_DECODE_RATIO, PAPER_PREFILL_RATIO
from jet_export.bench.rows import Row
from jet_export.bench.serving import ServingRow
from jet_export.utils.console import human
from jet_export.utils.files import write_atomically

R = TypeVar("R")
Column = tuple[str, Callable[[R], str]]  # its name, and a row's cell


def tabulate(rows: Sequence[R], columns: Sequence[Column[R]], left: Sequence[str]) -> Table:
    """A table with one row for each of `rows`; columns named in `left` are left-aligned."""
    out = Table(box=None, header_style="bold")
    for name, _ in columns:
        out.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        out.add_row(*(cell(row) for _, cell in columns))
    return out


def table(rows: Sequence[Row]) -> Table:
    """One row per case; "of roof": the share of what the roofline allows; where a row's states are written every few
    tokens, also "of roof/L", the share of one that writes them so (see `footnotes`)."""
    columns: list[Column[Row]] = [
        ("model", lambda r: f"{SHAPED.get(r.model, r.model)} {r.precision}"),
        ("context", lambda r: str(r.context) + ("*" if r.throughput_only else "")),
        ("batch", lambda r: str(r.batch)),
        ("prefill tok/s", lambda r: f"{r.prefill_tokens_per_s:,.0f}"),
        ("of roof", lambda r: f"{r.prefill_of_roofline:.0%}"),
        ("decode tok/s", lambda r: f"{r.decode_tokens_per_s:,.0f}"),
        ("ms/token", lambda r: f"{r.ms_per_token:.3g}"),
        ("p90", lambda r: f"{r.ms_per_token_p90:.3g}"),
        ("of roof", lambda r: f"{r.decode_of_roofline:.0%}"),
        ("of roof/L", lambda r: percent(r.decode_of_interval_roofline)),
        ("TTFT p50", lambda r: milliseconds(r.ttft_p50)),
        ("p99", lambda r: milliseconds(r.ttft_p99)),
        ("memory", lambda r: human(r.memory_peak or r.memory_predicted) + ("" if r.memory_peak else " pred.")),
        ("filled by", lambda r: r.filled_by),
    ]
    if all(r.state_interval == 1 for r in rows):
        columns = [c for c in columns if c[0] != "of roof/L"]
    return tabulate(rows, columns, left=("model", "filled by"))


def serving_table(rows: Sequence[tuple[str, str, ServingRow]]) -> Table:
    """One row per burst of requests; new tokens/s of all requests together, ms/token of one request."""
    columns: list[Column[tuple[str, str, ServingRow]]] = [
        ("model", lambda s: f"{SHAPED.get(s[0], s[0])} {s[1]}"),
        ("context", lambda s: str(s[2].context)),
        ("new tokens", lambda s: str(s[2].new_tokens)),
        ("requests", lambda s: str(s[2].requests)),
        ("slots", lambda s: str(s[2].slots)),
        ("new tok/s", lambda s: f"{s[2].tokens_per_s:,.0f}"),
        ("TTFT p50", lambda s: milliseconds(s[2].ttft_p50)),
        ("p99", lambda s: milliseconds(s[2].ttft_p99)),
        ("ms/token", lambda s: f"{s[2].ms_per_token_p50:.3g}"),
        ("p99", lambda s: f"{s[2].ms_per_token_p99:.3g}"),
        ("sampling", lambda s: s[2].sampling),
    ]
    return tabulate(rows, columns, left=("model", "sampling"))


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


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
    if intervals := sorted({r.state_interval for r in rows} - {1}):
        notes.append(
            f"recurrent states written every {' or '.join(map(str, intervals))} tokens (L): decode tok/s by the mean "
            "step of whole intervals, ms/token and p90 of single steps; decode's of roof: of a step that writes them, "
            "of roof/L: of the average of L steps that write them once, and each other a token beside them"
        )
    few = [r for r in rows if 0 < r.ttft_samples < 100]
    if few:
        notes.append(f"TTFT of {min(r.ttft_samples for r in few)} or more samples a row: p99 is the largest of them")
    return notes


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """Cases that one and the same build would allow share a line."""
    groups: dict[tuple[int, int, str, str], list[int]] = {}
    for s in skipped:
        groups.setdefault((s.context, s.chunk, s.reason, s.remedy), []).append(s.batch)
    return [
        f"skipped: context {context}, batch {', '.join(map(str, batches))}, chunk {chunk}: {reason}\n  {remedy}"
        for (context, chunk, reason, remedy), batches in groups.items()
    ]


def ratio_table(ratios: Sequence[Ratio]) -> Table:
    """One row per ratio, with the paper's beside it."""
    paper = {"decode": PAPER_DECODE_RATIO, "prefill": PAPER_PREFILL_RATIO}
    columns: list[Column[Ratio]] = [
        ("", lambda r: r.kind),
        ("at", lambda r: r.at),
        ("context", lambda r: str(r.context) + ("*" if r.throughput_only else "")),
        ("batch", lambda r: str(r.batch)),
        ("tok/s", lambda r: f"{r.tokens_per_s:,.0f}"),
        ("baseline", lambda r: r.baseline),
        ("its batch", lambda r: str(r.baseline_batch)),
        ("its tok/s", lambda r: f"{r.baseline_tokens_per_s:,.0f}"),
        ("of its roof", lambda r: f"{r.baseline_of_roofline:.0%}"),
        ("ratio", lambda r: f"{r.ratio:.2f}x" if r.ratio is not None else "not quoted"),
        ("paper", lambda r: f"{paper[r.kind][r.context]}x" if r.context in paper[r.kind] else ""),
    ]
    return tabulate(ratios, columns, left=("", "at", "baseline"))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per row; the bytes of a step are columns, empty where a row has none."""
    records = []
    for r in rows:
        record = asdict(r)
        for name in ("step_bytes", "interval_step_bytes"):
            record.update({f"{name}_{k}": v for k, v in (record.pop(name) or {}).items()})
        records.append(record)
    _write_records(path, records)


def write_serving_csv(path: Path, rows: Sequence[tuple[str, str, ServingRow]]) -> None:
    """One line per row: model, precision and the figures."""
    _write_records(path, [{"model": model, "precision": precision, **asdict(r)} for model, precision, r in rows])


def _write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(records)
    write_atomically(path, text.getvalue())
