"""The files that a search writes: results.json, points.csv, layers.csv, best.json, and report.py's page."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from jet_export.search.cells import Cell, base_cell, whole_cell
from jet_export.search.database import Metric
from jet_export.search.evaluation import Evaluation
from jet_export.search.report import report
from jet_export.search.scores import Published, published
from jet_export.search.search import Search
from jet_export.search.spec import RECORD_KEY
from jet_export.utils.environment import environment
from jet_export.utils.files import write_atomically


def write_results(search: Search) -> None:
    """Write all files, each atomically."""
    results, output = results_dict(search), search.spec.output
    write_atomically(output / "best.json", json.dumps(best_config(search), indent=2) + "\n")
    write_atomically(output / "points.csv", csv_text(point_rows(search)))
    write_atomically(output / "layers.csv", csv_text(layer_rows(search)))
    write_atomically(output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_atomically(output / "report.html", report(results))


def build_command(search: Search, e: Evaluation) -> str:
    """The command that builds the point from random weights, with limits for the target."""
    p, spec = e.point, search.spec
    limits = {
        "--max-batch-size": spec.space.target_batch,
        "--max-seq-len": spec.space.target_context + spec.space.new_tokens,
    }
    words = ["jet-export", "build", "--model", str(spec.output / "best.json"), "--random-weights"]
    words += ["--fp8"] if p.fp8 else []
    words += ["--kv-cache-dtype", "fp8"] if p.kv_cache_dtype == "fp8" else []
    words += ["--state-dtype", p.state_dtype] if p.state_dtype != "float32" else []
    words += ["--dtype", spec.options.dtype] if spec.options.dtype != "bfloat16" else []
    words += [word for flag, value in limits.items() for word in (flag, str(value))]
    return shlex.join(words)


def best_config(search: Search) -> dict[str, Any]:
    """The chosen architecture as a config.json that `jet-export build --model best.json` takes."""
    best = search.chosen
    assert best is not None and best.config is not None
    own = {k: v for k, v in search.spec.preset.raw.items() if k not in ("layer_types", "efficient_attention_config")}
    config = replace(best.config, raw=own).to_dict()
    config[RECORD_KEY] = {"point": best.label, "build": build_command(search, best), "why": search.state.reason}
    return config


def none_if_nan(x: float | None) -> float | None:
    return None if x is None or math.isnan(x) else x


def paper_row(e: Evaluation) -> Published | None:
    """The paper's figures, if the point is in its table."""
    sizes = set(e.point.sizes)
    return published()[0].get(next(iter(sizes))) if len(sizes) == 1 else None


def filled_by(search: Search, cells: Iterable[Cell], metric: Metric) -> str | None:
    """How the states of these engines were filled: "synthetic" if those of any were."""
    found = {search.state.filled_by.get(cell, {}).get(metric) for cell in cells} - {None, ""}
    return max(found, default=None, key=str)


def synthetic_note(search: Search) -> str | None:
    """A warning if anything was measured on states that no prefill computed."""
    ways = [way for known in search.state.filled_by.values() for way in known.values()]
    synthetic = ways.count("synthetic")
    part = f"in {synthetic} of {len(ways)} measurements, filled_by in results.json"
    return f"synthetic: states made of noise instead of prefilled, {part}" if synthetic else None


def point_row(search: Search, e: Evaluation) -> dict[str, Any]:
    b, c = search.spec.target
    decode: Metric = (b, c, "decode")
    paper = paper_row(e)
    cells = search.cells_of(e.point) if e.config is not None and e.predicted is not None else []
    whole = [whole_cell(e.point, e.config)] if e.config is not None and e.measured else []
    return {
        "point": e.label,
        "sizes": "+".join(map(str, e.point.sizes)),
        "key_heads": e.config.key_heads if e.config is not None and e.config.jet_conv == "static" else None,
        "layout": e.point.layout,
        "window_size": e.point.window_size,
        "fp8": e.point.fp8,
        "state_dtype": e.point.state_dtype,
        "kv_cache_dtype": e.point.kv_cache_dtype,
        "refused": e.refused,
        "missed": e.missed,
        "parameters": e.parameters or None,
        "cache_bytes": e.cache_bytes or None,
        "conv_state_bytes": e.conv_bytes or None,
        "score": e.score,
        "decode_ms": e.predicted.get(decode) if e.predicted else None,
        "tokens_per_s": none_if_nan(e.tokens_per_s(b, c)),
        "prefill_tokens_per_s": none_if_nan(e.tokens_per_s(b, c, "prefill")),
        "whole_decode_ms": e.measured[decode] if e.measured else None,
        "whole_tokens_per_s": none_if_nan(e.tokens_per_s(b, c, latencies=e.measured)) if e.measured else None,
        "filled_by": filled_by(search, cells, decode),
        "whole_filled_by": filled_by(search, whole, decode),
        "prediction_error": e.error(decode),
        "prefill_prediction_error": e.error((b, c, "prefill")),
        "paper_tokens_per_s": paper.throughput if paper else None,
        "paper_retrieval": paper.retrieval if paper else None,
        "paper_math": paper.math if paper else None,
        "front": e.front,
        "chosen": e.chosen,
    }


def point_rows(search: Search) -> list[dict[str, Any]]:
    """Fastest first, refused ones last."""
    rows = [point_row(search, e) for e in search.state.evaluations.values()]
    return sorted(rows, key=lambda r: (r["refused"] is not None, -(r["tokens_per_s"] or 0.0)))


def layer_rows(search: Search) -> list[dict[str, Any]]:
    """A row for each cell and metric: the milliseconds that one such layer adds."""
    base, state = base_cell(search.spec.preset), search.state
    tables = [("base (embedding, last norm, lm_head)", base, state.base)]
    tables += [(str(cell), cell, added) for cell, added in state.layers.items()]
    return [
        {
            "layer": name,
            "batch": metric[0],
            "context": metric[1],
            "phase": metric[2],
            "ms": ms,
            "filled_by": filled_by(search, (base, cell), metric),
        }
        for name, cell, latencies in tables
        for metric, ms in latencies.items()
    ]


def prediction_rows(search: Search) -> list[dict[str, Any]]:
    """Predicted and measured latencies of the points on the front that were measured whole."""
    return [
        {
            "point": e.label,
            "batch": metric[0],
            "context": metric[1],
            "phase": metric[2],
            "predicted_ms": e.predicted[metric],
            "measured_ms": ms,
            "error": e.error(metric),
        }
        for e in search.front
        if e.measured and e.predicted
        for metric, ms in e.measured.items()
        if metric in e.predicted
    ]


def csv_text(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def spread_percent(values: list[float]) -> float | None:
    return 100 * (max(values) / min(values) - 1) if len(values) > 1 else None


def results_dict(search: Search) -> dict[str, Any]:
    spec, state = search.spec, search.state
    rows = point_rows(search)
    speeds = [r["tokens_per_s"] for r in rows if r["tokens_per_s"]]
    best = search.chosen
    assert best is not None
    batch, context = spec.target
    paper = published()[1]
    return {
        "environment": environment(),
        "machine": spec.setup.machine,
        "options": spec.options.record(),
        "space": json.loads(json.dumps(spec.space.describe())),
        "score": {"name": spec.score.name, "source": spec.score.source, "unmatched": spec.unmatched_scores},
        "target": {"batch": batch, "context": context},
        "sampler": spec.sampler,
        "seconds": round(state.seconds, 1),
        "timed_out": state.timed_out,
        "synthetic": synthetic_note(search),
        "noisy_measurements": {"over 10 %": state.noisy, "of": state.repeated},
        "choice": {"point": best.label, "why": state.reason, "build": build_command(search, best)},
        "spread_percent": spread_percent(speeds),
        "paper": {k: paper[k] for k in ("source", "gpu", "cache_mb", "spread_percent")},
        "points": rows,
        "left_out": list(state.inconsistent.values()),
        "layers": layer_rows(search),
        "predictions": prediction_rows(search),
        "failed": {str(cell): reason for cell, reason in state.failed.items()},
    }
