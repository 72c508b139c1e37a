"""report.html, a self-contained page (inline SVG, no scripts, no network), and front.svg."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from jet_export.search.search import Search
from jet_export.search.svg import Dot, bars, scatter
from jet_export.utils.console import human

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 0.6em 0 } td, th { padding: 2px 9px; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 }
code { background: #f2f2f2; padding: 1px 4px } .chosen td { font-weight: bold; color: #d62728 } svg { max-width: 100% }
"""


def report(search: Search, results: dict[str, Any]) -> tuple[str, str]:
    """(report.html, front.svg)."""
    picture = front_chart(search, results, "score", search.spec.score.name)
    sections = [
        choice_section(search, results),
        "<h2>Throughput against score</h2>" + picture,
        parameters_section(search, results),
        "<h2>Points</h2>" + points_table(results),
        layers_section(search, results),
        predictions_section(results),
        refused_section(results),
        environment_section(results),
    ]
    title = escape(f"jet-export search: {search.spec.options.model}")
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"{head}</head><body><h1>{title}</h1>{''.join(sections)}</body></html>\n", picture


def front_chart(search: Search, results: dict[str, Any], y: str, y_name: str) -> str:
    b, c = search.spec.target
    dots = [
        Dot(x=r["tokens_per_s"], y=r[y], label=r["point"], front=r["front"], chosen=r["chosen"])
        for r in results["points"]
        if r["tokens_per_s"] and r[y] is not None
    ]
    title = f"batch {b}, context {c}: predicted from single layers"
    return scatter(dots, title=title, x_name="tokens/s, whole batch", y_name=y_name)


def choice_section(search: Search, results: dict[str, Any]) -> str:
    choice, machine, spread = results["choice"], results["machine"], results["spread_percent"]
    paper = results["paper"]
    spread_words = (
        f"<p>Throughput, predicted from single layers, differs by {spread:.1f} % between the fastest and the slowest "
        f"of the points; "
        f"the paper ({escape(paper['source'])}, {escape(paper['gpu'])}) sees {paper['spread_percent']} %.</p>"
        if spread is not None
        else ""
    )
    return (
        f"<p>Measured on <b>{escape(str(machine['device']))}</b>, {escape(results['environment']['date'])}; score: "
        f"{escape(search.spec.score.name)}, {escape(search.spec.score.source)}.</p>"
        f"<h2>Choice</h2><p><b>{escape(choice['point'])}</b>: {escape(choice['why'])}.</p>"
        f"<p><code>{escape(choice['build'])}</code></p>{spread_words}"
    )


def parameters_section(search: Search, results: dict[str, Any]) -> str:
    """Left out if the parameters are the score, which has a chart already."""
    if search.spec.score.name == "parameters":
        return ""
    return "<h2>Throughput against parameters</h2>" + front_chart(search, results, "parameters", "parameters")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], classes: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape('–' if v is None else str(v))}</td>" for v in row)
        body += f'<tr class="{classes[i] if i < len(classes) else ""}">{cells}</tr>'
    return f"<table><tr>{head}</tr>{body}</table>"


def points_table(results: dict[str, Any]) -> str:
    def form(x: float | None, spec: str = ",.0f") -> str | None:
        return None if x is None else format(x, spec)

    columns: dict[str, Callable[[dict[str, Any]], str | None]] = {
        "point": lambda r: r["point"],
        "parameters": lambda r: form(r["parameters"]),
        "cache a sequence": lambda r: human(r["cache_bytes"]),
        "+ conv taps": lambda r: human(r["conv_state_bytes"] or 0),
        "score": lambda r: form(r["score"], ",.6g"),
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
    shown = [r for r in results["points"] if r["refused"] is None]
    rows = [[column(r) for column in columns.values()] for r in shown]
    note = "<p>The paper's columns are its own, on its machine; – where this project does not have the figure.</p>"
    return table(list(columns), rows, ["chosen" if r["chosen"] else "" for r in shown]) + note


def layers_section(search: Search, results: dict[str, Any]) -> str:
    """Milliseconds that one layer adds: charts at the target, a table of every batch and context."""
    b, c = search.spec.target
    out = "<h2>Per-layer latency</h2><p>(engine of equal layers - engine without layers) / layers.</p>"
    for phase, what in (("decode", "one decode step of the batch"), ("prefill", "prefill of the whole context")):
        at = [r for r in results["layers"] if (r["batch"], r["context"], r["phase"]) == (b, c, phase)]
        out += bars([(r["layer"], r["ms"]) for r in at], title=f"{what}, batch {b}, context {c}", unit="ms")
    rows = [
        [r["layer"], r["batch"], r["context"], r["phase"], f"{r['ms']:.4g}", r["filled_by"]] for r in results["layers"]
    ]
    note = f"<p>{escape(results['synthetic'])}.</p>" if results["synthetic"] else ""
    note += "".join(f"<p>Left out: {escape(why)}</p>" for why in results["left_out"])
    return out + table(["layer", "batch", "context", "phase", "ms", "filled by"], rows) + note


def predictions_section(results: dict[str, Any]) -> str:
    rows = results["predictions"]
    if not rows:
        return "<h2>Prediction against measurement</h2><p>No point was built whole.</p>"
    out = "<h2>Prediction against measurement</h2>"
    for phase in ("decode", "prefill"):
        dots = [
            Dot(x=r["predicted_ms"], y=r["measured_ms"], label=f"{r['point']} B{r['batch']} {r['context']}")
            for r in rows
            if r["phase"] == phase
        ]
        out += scatter(dots, title=phase, x_name="predicted ms", y_name="measured ms", diagonal=True)
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
