"""report.html, a self-contained page: what results.json holds, with charts (no network).

python -m jet_export.search.report RESULTS.json [PAGE.html]      # of an earlier search
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jet_export.search import charts
from jet_export.search.scores import published
from jet_export.utils.console import human
from jet_export.utils.files import write_atomically

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 0.6em 0 } td, th { padding: 2px 7px; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 }
code { background: #f2f2f2; padding: 1px 4px } .chosen td { font-weight: bold; color: #d62728 }
.wide { overflow-x: auto }
"""
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
NO_CHARTS = "<p>No charts: plotly was not installed (pip install 'jet-export[search]').</p>"


def report(results: dict[str, Any]) -> str:
    """The page of a results.json."""
    points, drawn = with_paper(results["points"]), charts.plotly() is not None
    sections = [
        choice_section(results),
        front_section(results, points) if drawn else NO_CHARTS,
        "<h2>Points</h2>" + points_table(points),
        paper_section(results, points) if drawn else "",
        layers_section(results, drawn),
        predictions_section(results, drawn),
        refused_section(results),
        environment_section(results),
    ]
    title = escape(f"jet-export search: {results['options']['model']}")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>'
    script = f"<script>{charts.library()}</script>" if drawn else ""
    body = f"<h1>{title}</h1>{''.join(sections)}"
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style>{script}</head><body>{body}</body></html>\n'
    )


def with_paper(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what is known of the paper's figures today."""
    known = {str(dims): row for dims, row in published()[0].items()}
    rows = []
    for r in points:
        p = known.get(r["sizes"])
        paper = {"paper_tokens_per_s": p.throughput, "paper_retrieval": p.retrieval, "paper_math": p.math} if p else {}
        rows.append({**r, **paper})
    return rows


def choice_section(results: dict[str, Any]) -> str:
    choice, machine, spread = results["choice"], results["machine"], results["spread_percent"]
    paper, score = published()[1], results["score"]
    spread_words = (
        f"<p>Throughput, predicted from single layers, differs by {spread:.1f} % between the fastest and the slowest "
        f"of the points; "
        f"the paper ({escape(paper['source'])}, {escape(paper['gpu'])}) sees {paper['spread_percent']} %.</p>"
        if spread is not None
        else ""
    )
    return (
        f"<p>Measured on <b>{escape(str(machine['device']))}</b>, {escape(results['environment']['date'])}; score: "
        f"{escape(score['name'])}, {escape(score['source'])}.</p>"
        f"<h2>Choice</h2><p><b>{escape(choice['point'])}</b>: {escape(choice['why'])}.</p>"
        f"<p><code>{escape(choice['build'])}</code></p>{spread_words}"
    )


def front_section(results: dict[str, Any], points: Sequence[dict[str, Any]]) -> str:
    """Against the score and, unless they are the score, the parameters."""
    b, c = results["target"]["batch"], results["target"]["context"]
    title, name = f"batch {b}, context {c}: predicted from single layers", results["score"]["name"]
    out = "<h2>Throughput against score</h2>" + charts.front(points, "score", name, title)
    if name != "parameters":
        out += "<h2>Throughput against parameters</h2>" + charts.front(points, "parameters", "parameters", title)
    return out


def paper_section(results: dict[str, Any], points: Sequence[dict[str, Any]]) -> str:
    if not any(r["tokens_per_s"] and r["paper_tokens_per_s"] for r in points):
        return ""
    paper = published()[1]
    note = f"<p>The paper's: {escape(paper['source'])}; {escape(paper['gpu'])}.</p>"
    return "<h2>Beside the paper</h2>" + note + charts.beside_paper(points)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], classes: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape('–' if v is None else str(v))}</td>" for v in row)
        body += f'<tr class="{classes[i] if i < len(classes) else ""}">{cells}</tr>'
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def points_table(points: Sequence[dict[str, Any]]) -> str:
    def form(x: float | None, spec: str = ",.0f") -> str | None:
        return None if x is None else format(x, spec)

    columns: dict[str, Callable[[dict[str, Any]], str | None]] = {
        "point": lambda r: r["point"],
        "parameters": lambda r: form(r["parameters"]),
        "cache a sequence": lambda r: human(r["cache_bytes"]),
        "+ conv taps": lambda r: human(r["conv_state_bytes"] or 0),
        "score": lambda r: None if r["score"] is None else charts.score(r["score"]),
        "step ms": lambda r: form(r["decode_ms"], ".4g"),
        "tokens/s": lambda r: form(r["tokens_per_s"]),
        "prefill tok/s": lambda r: form(r["prefill_tokens_per_s"]),
        "whole: tokens/s": lambda r: form(r["whole_tokens_per_s"]),
        "error": lambda r: form(r["prediction_error"], "+.1%"),
        "paper: tokens/s": lambda r: form(r["paper_tokens_per_s"]),
        "paper: retrieval": lambda r: form(r["paper_retrieval"], ".1f"),
        "paper: math": lambda r: form(r["paper_math"], ".1f"),
        "": lambda r: "chosen" if r["chosen"] else "front" if r["front"] else r["missed"] or "",
    }
    shown = [r for r in points if r["refused"] is None]
    rows = [[column(r) for column in columns.values()] for r in shown]
    note = "<p>The paper's columns are its own, on its machine; – where this project does not have the figure.</p>"
    return table(list(columns), rows, ["chosen" if r["chosen"] else "" for r in shown]) + note


def layers_section(results: dict[str, Any], drawn: bool) -> str:
    """Milliseconds that one layer adds: charts at the target, a table of every batch and context."""
    out = "<h2>Per-layer latency</h2><p>(engine of equal layers - engine without layers) / layers.</p>"
    if drawn:
        out += charts.layers(results["layers"], results["target"]["batch"], results["target"]["context"])
    columns = ("layer", "batch", "context", "phase", "ms", "filled_by")
    cells = [[f"{r[k]:.4g}" if k == "ms" else r.get(k) for k in columns] for r in results["layers"]]
    note = f"<p>{escape(results['synthetic'])}.</p>" if results.get("synthetic") else ""
    note += "".join(f"<p>Left out: {escape(why)}</p>" for why in results.get("left_out", ()))
    return out + table([c.replace("_", " ") for c in columns], cells) + note


def predictions_section(results: dict[str, Any], drawn: bool) -> str:
    rows = results["predictions"]
    if not rows:
        return "<h2>Prediction against measurement</h2><p>No point was built whole.</p>"
    out = "<h2>Prediction against measurement</h2>" + (charts.predictions(rows) if drawn else "")
    heads = ["point", "batch", "context", "phase", "predicted ms", "measured ms", "error"]
    figures = [[f"{r['predicted_ms']:.4g}", f"{r['measured_ms']:.4g}", f"{100 * r['error']:+.1f} %"] for r in rows]
    cases = [[r["point"], r["batch"], r["context"], r["phase"]] for r in rows]
    return out + table(heads, [[*case, *values] for case, values in zip(cases, figures, strict=True)])


def refused_section(results: dict[str, Any]) -> str:
    refused = [[r["point"], r["refused"]] for r in results["points"] if r["refused"]]
    failed = [[cell, reason] for cell, reason in results["failed"].items()]
    out = "<h2>Refused before anything was built</h2>" + table(["point", "why"], refused) if refused else ""
    return out + ("<h2>Failed</h2>" + table(["engine", "why"], failed) if failed else "")


def environment_section(results: dict[str, Any]) -> str:
    rows = [[k, v] for k, v in {**results["environment"], **results["machine"]}.items()]
    rows += [["sampler", results["sampler"]], ["seconds", results["seconds"]]]
    return "<h2>Environment</h2>" + table(["", ""], rows)


def main(file: str, page: str | None = None) -> None:
    results = Path(file)
    out = Path(page) if page else results.with_name("report.html")
    write_atomically(out, report(json.loads(results.read_text(encoding="utf-8"))))
    print(f"written: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
