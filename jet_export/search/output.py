"""What a search leaves: a table in the terminal; results.json, two CSV files, report.html, front.svg, best.json."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rich.table import Table

from jet_export.search.cells import Cell, base_cell, cells_of, whole_cell
from jet_export.search.choose import Evaluation
from jet_export.search.points import short
from jet_export.search.run import RECORD_KEY, Search, options_record
from jet_export.search.scores import Published, published
from jet_export.utils.console import human
from jet_export.utils.environment import environment
from jet_export.utils.files import write_atomically


def write_results(search: Search) -> None:
    """All files, each whole or not at all."""
    from jet_export.search.html import report

    results = results_dict(search)
    write_atomically(search.output / "best.json", json.dumps(best_config(search), indent=2) + "\n")
    write_atomically(search.output / "points.csv", csv_text(point_rows(search)))
    write_atomically(search.output / "layers.csv", csv_text(layer_rows(search)))
    page, picture = report(search, results)
    write_atomically(search.output / "front.svg", picture)
    write_atomically(search.output / "report.html", page)
    write_atomically(search.output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")


def build_command(search: Search, e: Evaluation) -> str:
    """What builds the choice from random weights, at the target's limits."""
    p, s = e.point, search.space
    words = ["jet-export", "build", "--model", str(search.output / "best.json"), "--random-weights"]
    words += ["--fp8"] if p.fp8 else []
    words += ["--kv-cache-dtype", "fp8"] if p.kv_cache_dtype == "fp8" else []
    words += ["--state-dtype", p.state_dtype] if p.state_dtype != "float32" else []
    words += ["--dtype", search.options.dtype] if search.options.dtype != "bfloat16" else []
    words += ["--max-batch-size", str(s.target_batch), "--max-seq-len", str(s.target_context + s.new_tokens)]
    return shlex.join(words)


def best_config(search: Search) -> dict[str, Any]:
    """The chosen architecture as a config.json that `jet-export build --model best.json` takes."""
    best = search.chosen
    assert best is not None and best.config is not None
    own = {k: v for k, v in search.preset.raw.items() if k not in ("layer_types", "efficient_attention_config")}
    config = replace(best.config, raw=own).to_dict()
    config[RECORD_KEY] = {"point": best.label, "build": build_command(search, best), "why": search.why}
    return config


def finite(x: float | None) -> float | None:
    return None if x is None or math.isnan(x) else x


def paper_of(search: Search, e: Evaluation) -> Published | None:
    """The paper's row, where the point is one of its."""
    sizes = set(e.point.sizes)
    return published()[0].get(next(iter(sizes))) if len(sizes) == 1 else None


def filled_by(search: Search, cells: Iterable[Cell], case: tuple[int, int, str]) -> str | None:
    """How the states of these engines were filled: "synthetic" where those of one were."""
    found = {search.filled.get(cell, {}).get(case) for cell in cells} - {None, ""}
    return max(found, default=None, key=str)


def noise_note(search: Search) -> str | None:
    """What has to be said where anything was measured on states that no prefill made."""
    ways = [way for known in search.filled.values() for way in known.values()]
    noise = ways.count("synthetic")
    part = f"in {noise} of {len(ways)} measurements, filled_by in results.json"
    return f"synthetic: states made of noise instead of prefilled, {part}" if noise else None


def point_row(search: Search, e: Evaluation) -> dict[str, Any]:
    b, c = search.target
    case = (b, c, "decode")
    row: dict[str, Any] = {"point": e.label, "sizes": "+".join(map(str, e.point.sizes)), "layout": e.point.layout}
    row |= {"window_size": e.point.window_size, "fp8": e.point.fp8, "state_dtype": e.point.state_dtype}
    row |= {"kv_cache_dtype": e.point.kv_cache_dtype, "refused": e.refused, "missed": e.missed}
    row |= {"parameters": e.parameters or None, "cache_bytes": e.cache_bytes or None}
    row |= {"conv_state_bytes": e.conv_bytes or None, "score": e.score}
    row["decode_ms"] = e.predicted.get(case) if e.predicted else None
    row["tokens_per_s"] = finite(e.tokens_per_s(b, c))
    row["prefill_tokens_per_s"] = finite(e.tokens_per_s(b, c, "prefill"))
    row["whole_decode_ms"] = e.measured[case] if e.measured else None
    row["whole_tokens_per_s"] = finite(e.tokens_per_s(b, c, latency=e.measured)) if e.measured else None
    known = e.config is not None and e.predicted is not None
    row["filled_by"] = filled_by(search, cells_of(e.point, search.preset, search.space), case) if known else None
    whole = [whole_cell(e.point, e.config)] if e.config is not None and e.measured else []
    row["whole_filled_by"] = filled_by(search, whole, case)
    row["prediction_error"] = e.error(case)
    row["prefill_prediction_error"] = e.error((b, c, "prefill"))
    theirs = paper_of(search, e)
    row["paper_tokens_per_s"] = theirs.throughput if theirs else None
    row["paper_retrieval"] = theirs.retrieval if theirs else None
    row["paper_math"] = theirs.math if theirs else None
    return {**row, "front": e.front, "chosen": e.chosen}


def point_rows(search: Search) -> list[dict[str, Any]]:
    """Fastest first, refused ones last."""
    rows = [point_row(search, e) for e in search.evaluations.values()]
    return sorted(rows, key=lambda r: (r["refused"] is not None, -(r["tokens_per_s"] or 0.0)))


def layer_rows(search: Search) -> list[dict[str, Any]]:
    """A row a cell and case: the milliseconds that one such layer adds."""
    base = base_cell(search.preset)
    tables = [("base (embedding, last norm, lm_head)", base, search.base)]
    tables += [(str(cell), cell, shares) for cell, shares in search.layers.items()]
    return [
        {"layer": name, "batch": case[0], "context": case[1], "phase": case[2], "ms": ms,
         "filled_by": filled_by(search, (base, cell), case)}
        for name, cell, shares in tables for case, ms in shares.items()
    ]  # fmt: skip


def csv_text(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def spread_percent(values: list[float]) -> float | None:
    return 100 * (max(values) / min(values) - 1) if len(values) > 1 else None


def results_dict(search: Search) -> dict[str, Any]:
    rows = point_rows(search)
    speeds = [r["tokens_per_s"] for r in rows if r["tokens_per_s"]]
    best = search.chosen
    assert best is not None
    b, c = search.target
    predictions = [
        {"point": e.label, "batch": case[0], "context": case[1], "phase": case[2], "predicted_ms": e.predicted[case],
         "measured_ms": ms, "error": e.error(case)}
        for e in search.front if e.measured and e.predicted for case, ms in e.measured.items() if case in e.predicted
    ]  # fmt: skip
    remarks = published()[1]
    return {
        "environment": environment(),
        "machine": search.bench.machine,
        "options": options_record(search),
        "space": json.loads(json.dumps(search.space.describe())),
        "score": {"name": search.score.name, "source": search.score.source, "unmatched": search.unmatched},
        "target": {"batch": b, "context": c},
        "sampler": search.sampler,
        "seconds": round(search.seconds, 1),
        "timed_out": search.timed_out,
        "synthetic": noise_note(search),
        "noisy_measurements": {"over 10 %": search.noisy[0], "of": search.noisy[1]},
        "choice": {"point": best.label, "why": search.why, "build": build_command(search, best)},
        "spread_percent": spread_percent(speeds),
        "paper": {k: remarks[k] for k in ("source", "gpu", "cache_mb", "spread_percent")},
        "points": rows,
        "left_out": list(search.at_odds.values()),
        "layers": layer_rows(search),
        "predictions": predictions,
        "failed": {str(cell): reason for cell, reason in search.failed.items()},
    }


SHOWN = 24


def results_table(search: Search) -> Table:
    """Points by predicted throughput: those on the front, and the fastest others."""
    rows = [r for r in point_rows(search) if r["refused"] is None]
    shown = [r for i, r in enumerate(rows) if i < SHOWN or r["front"]]
    paper = any(r["paper_tokens_per_s"] for r in shown)
    table = Table(box=None, header_style="bold")
    table.add_column("point")
    by_parameters = search.score.name == "parameters"
    heads = ["parameters", "cache", "step ms", "tokens/s", "prefill tok/s", *([] if by_parameters else ["score"]),
             "whole: tokens/s", "predicted", *(["paper tok/s"] if paper else [])]  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right")
    table.add_column("")
    for r in shown:
        error = r["prediction_error"]
        cells = [r["point"], f"{r['parameters'] / 1e6:,.1f} M", human(r["cache_bytes"])]
        cells += [number(r["decode_ms"], "{:.4g}"), number(r["tokens_per_s"]), number(r["prefill_tokens_per_s"])]
        cells += [] if by_parameters else [number(r["score"], "{:.4g}")]
        cells += [number(r["whole_tokens_per_s"]), "–" if error is None else f"{100 * error:+.1f} %"]
        cells += [number(r["paper_tokens_per_s"])] if paper else []
        note = "chosen" if r["chosen"] else "front" if r["front"] else r["missed"] or ""
        table.add_row(*cells, note)
    return table


def number(x: float | None, form: str = "{:,.0f}") -> str:
    return "–" if x is None else form.format(x)


def summary_lines(search: Search) -> list[str]:
    """What is said below the table."""
    best = search.chosen
    assert best is not None
    refused = [e for e in search.evaluations.values() if e.refused]
    b, c = search.target
    lines = [f"decode and prefill at batch {b}, context {c}; a point's figures are the sums of its layers'; predicted: "
             "their error against the engine built whole"]  # fmt: skip
    lines += [f"refused: {e.label}: {e.refused}" for e in refused[:SHOWN]]
    lines += [f"refused: {len(refused) - SHOWN} more, in points.csv"] if len(refused) > SHOWN else []
    lines += [f"failed: {reason}" for reason in search.failed.values()]
    noisy, repeated = search.noisy
    lines += [f"noise: {noisy} of {repeated} measurements are over 10 % quicker than the next of their repeats; is the "
              "machine in use? --resume --remeasure measures them again"] if noisy else []  # fmt: skip
    lines += [f"left out: {why} --resume --remeasure measures it again" for why in search.at_odds.values()]
    lines += [note] if (note := noise_note(search)) else []
    lines += ["out of time: not all points are measured; --resume goes on"] if search.timed_out else []
    precision = f"state {short(best.point.state_dtype)}" + (", FP8 weights" if best.point.fp8 else "")
    lines += [f"choice: {best.label} ({precision}): {search.why}", f"report: {search.output / 'report.html'}"]
    return [*lines, f"Next: {build_command(search, best)}"]
