"""report.html: one self-contained page (inline SVG, no scripts, no network), and the picture of the front."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from jet_export.search.run import Search
from jet_export.search.svg import Dot, bars, scatter
from jet_export.utils.console import human

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 0.6em 0 } td, th { padding: 2px 9px; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 }
code { background: #f2f2f2; padding: 1px 4px } .chosen td { font-weight: bold; color: #d62728 } svg { max-width: 100% }
"""


def report(search: Search, results: dict[str, Any]) -> tuple[str, str]:
    """(the page, the front's picture as SVG)."""
    picture = front_chart(search, results, "score", search.score.name)
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
    title = escape(f"jet-export search: {search.options.model}")
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"{head}</head><body><h1>{title}</h1>{''.join(sections)}</body></html>\n", picture


def front_chart(search: Search, results: dict[str, Any], y: str, y_name: str) -> str:
    b, c = search.target
    dots = [Dot(r["tokens_per_s"], r[y], r["point"], r["front"], r["chosen"])
            for r in results["points"] if r["tokens_per_s"] and r[y] is not None]  # fmt: skip
    return scatter(dots, f"batch {b}, context {c}: predicted from single layers", "tokens/s, whole batch", y_name)


def choice_section(search: Search, results: dict[str, Any]) -> str:
    choice, machine, spread = results["choice"], results["machine"], results["spread_percent"]
    paper = results["paper"]
    said = "" if spread is None else (
        f"<p>Throughput, predicted from single layers, differs by {spread:.1f} % between the fastest and the slowest "
        f"of the points; "
        f"the paper ({escape(paper['source'])}, {escape(paper['gpu'])}) sees {paper['spread_percent']} %.</p>"
    )  # fmt: skip
    return (
        f"<p>Measured on <b>{escape(str(machine['device']))}</b>, {escape(results['environment']['date'])}; score: "
        f"{escape(search.score.name)}, {escape(search.score.source)}.</p>"
        f"<h2>Choice</h2><p><b>{escape(choice['point'])}</b>: {escape(choice['why'])}.</p>"
        f"<p><code>{escape(choice['build'])}</code></p>{said}"
    )


def parameters_section(search: Search, results: dict[str, Any]) -> str:
    """Parameters at equal cache; not shown twice where they are the score."""
    if search.score.name == "parameters":
        return ""
    return "<h2>Throughput against parameters</h2>" + front_chart(search, results, "parameters", "parameters")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], classes: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        f'<tr class="{classes[i] if i < len(classes) else ""}">'
        + "".join(f"<td>{escape('–' if v is None else str(v))}</td>" for v in row) + "</tr>"
        for i, row in enumerate(rows)
    )  # fmt: skip
    return f"<table><tr>{head}</tr>{body}</table>"


def points_table(results: dict[str, Any]) -> str:
    def form(x: float | None, spec: str = ",.0f") -> str | None:
        return None if x is None else format(x, spec)

    heads = ["point", "parameters", "cache a sequence", "+ conv taps", "score", "step ms", "tokens/s", "prefill tok/s",
             "whole: tokens/s", "error", "paper: tokens/s", "paper: retrieval", "paper: math", ""]  # fmt: skip
    able = [r for r in results["points"] if r["refused"] is None]
    rows = [
        [r["point"], form(r["parameters"]), human(r["cache_bytes"]), human(r["conv_state_bytes"] or 0),
         form(r["score"], ",.6g"), form(r["decode_ms"], ".4g"), form(r["tokens_per_s"]),
         form(r["prefill_tokens_per_s"]),
         form(r["whole_tokens_per_s"]), form(r["prediction_error"], "+.1%"), form(r["paper_tokens_per_s"]),
         form(r["paper_retrieval"], ".1f"), form(r["paper_math"], ".1f"),
         "chosen" if r["chosen"] else "front" if r["front"] else r["missed"] or ""]
        for r in able
    ]  # fmt: skip
    note = "<p>The paper's columns are its own, on its machine; – where this project does not have the figure.</p>"
    return table(heads, rows, ["chosen" if r["chosen"] else "" for r in able]) + note


def layers_section(search: Search, results: dict[str, Any]) -> str:
    """Milliseconds that one layer adds, at every case: charts at the target, the rest as a table."""
    b, c = search.target
    out = "<h2>Per-layer latency</h2><p>(engine of equal layers - engine without layers) / layers.</p>"
    for phase, what in (("decode", "one decode step of the batch"), ("prefill", "prefill of the whole context")):
        at = [r for r in results["layers"] if (r["batch"], r["context"], r["phase"]) == (b, c, phase)]
        out += bars([(r["layer"], r["ms"]) for r in at], f"{what}, batch {b}, context {c}", "ms")
    others = [[r["layer"], r["batch"], r["context"], r["phase"], f"{r['ms']:.4g}", r["filled_by"]]
              for r in results["layers"]]  # fmt: skip
    note = f"<p>{escape(results['synthetic'])}.</p>" if results["synthetic"] else ""
    note += "".join(f"<p>Left out: {escape(why)}</p>" for why in results["left_out"])
    return out + table(["layer", "batch", "context", "phase", "ms", "filled by"], others) + note


def predictions_section(results: dict[str, Any]) -> str:
    rows = results["predictions"]
    if not rows:
        return "<h2>Prediction against measurement</h2><p>No point was built whole.</p>"
    out = "<h2>Prediction against measurement</h2>"
    for phase in ("decode", "prefill"):
        dots = [Dot(r["predicted_ms"], r["measured_ms"], f"{r['point']} B{r['batch']} {r['context']}", chosen=False)
                for r in rows if r["phase"] == phase]  # fmt: skip
        out += scatter(dots, phase, "predicted ms", "measured ms", diagonal=True)
    heads = ["point", "batch", "context", "phase", "predicted ms", "measured ms", "error"]
    return out + table(heads, [
        [r["point"], r["batch"], r["context"], r["phase"], f"{r['predicted_ms']:.4g}", f"{r['measured_ms']:.4g}",
         f"{100 * r['error']:+.1f} %"] for r in rows
    ])  # fmt: skip


def refused_section(results: dict[str, Any]) -> str:
    refused = [[r["point"], r["refused"]] for r in results["points"] if r["refused"]]
    failed = [[cell, reason] for cell, reason in results["failed"].items()]
    out = "<h2>Refused before anything was built</h2>" + table(["point", "why"], refused) if refused else ""
    return out + ("<h2>Failed</h2>" + table(["engine", "why"], failed) if failed else "")


def environment_section(results: dict[str, Any]) -> str:
    rows = [[k, v] for k, v in {**results["environment"], **results["machine"]}.items()]
    rows += [["sampler", results["sampler"]], ["seconds", results["seconds"]]]
    return "<h2>Environment</h2>" + table(["", ""], rows)
