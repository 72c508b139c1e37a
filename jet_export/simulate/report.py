"""What a simulation shows: a table for the terminal, and report.html, a self-contained page with charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

from jet_export.search.charts import library, plotly
from jet_export.search.report import NO_CHARTS, POLICY, STYLE, table
from jet_export.simulate import charts
from jet_export.simulate.cluster import Outcome

TITLE = "jet-export simulate"


def latency_rows(r: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the percentiles."""
    names = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "end to end": "e2e_ms"}
    columns = list(r["ttft_ms"])
    return ["ms", *columns], [[name, *(f"{r[key].get(c, 0):,.1f}" for c in columns)] for name, key in names.items()]


def lines(r: Mapping[str, Any]) -> list[str]:
    """The other figures, for people."""
    failed = ", ".join(f"{n} {why}" for why, n in r["failed"].items()) or "none failed"
    million = r["gpu_hours_per_million_tokens"]
    each = f", {million:.3g} per million tokens" if million else ""
    out = [
        f"{r['requests']:,} requests in {r['seconds']:,.1f} s ({failed}): {r['requests_per_s']:,.2f} requests/s, "
        f"{r['tokens_per_s']:,.0f} tokens/s, {r['prompt_tokens_per_s']:,.0f} prompt tokens/s",
        f"{r['most_replicas']} replicas, busy {r['busy']:.0%} of the time, at most {r['most_at_once']} requests on one "
        f"at once; {r['gpu_hours']:,.3f} GPU hours{each}",
    ]
    if r["cached_prompt_tokens"]:
        out.append(f"{r['cached_prompt_tokens']:.1%} of the prompt tokens came from the prefix cache")
    if r["preemptions"] or r["replica_failures"]:
        out.append(f"{r['preemptions']} preemptions, {r['replica_failures']} replica failures")
    if "slo" in r:
        s = r["slo"]
        out.append(f"SLO {s['asked']}: met by {s['met']:.2%}; goodput {s['goodput_requests_per_s']:,.2f} requests/s")
    return out


def terminal_table(r: Mapping[str, Any]) -> Table:
    heads, rows = latency_rows(r)
    out = Table(box=None, header_style="bold")
    for head in heads:
        out.add_column(head, justify="left" if head == "ms" else "right")
    for row in rows:
        out.add_row(*row)
    return out


def page(result: Mapping[str, Any], outcome: Outcome, where: Mapping[str, Any]) -> str:
    """report.html. `result`: as result.json; `where`: the environment."""
    drawn = plotly() is not None
    r = result["summary"]
    tried = [[t["replicas"], "met" if t["met"] else "not met"] for t in result["tried"]]
    sections = [
        "<p>" + "<br>".join(escape(line) for line in lines(r)) + "</p>" + table(*latency_rows(r)),
        charts.latencies(outcome) + charts.over_time(outcome) if drawn else NO_CHARTS,
        "<h2>Replicas tried</h2>" + table(["replicas", "SLO"], tried) if tried else "",
        "<h2>Step times</h2><p>" + "<br>".join(escape(x) for x in (*result["fit"], *result["gaps"])) + "</p>",
        "<h2>Simulated</h2>" + table(["", ""], _flat(result["options"])),
        "<h2>Environment</h2>" + table(["", ""], [[k, v] for k, v in where.items()]),
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{TITLE}</title>'
    script = f"<script>{library()}</script>" if drawn else ""
    body = f"<h1>{TITLE}: {escape(result['engine'])}</h1>{''.join(sections)}"
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style>{script}</head><body>{body}</body></html>\n'
    )


def _flat(values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
    return [[k, v] for k, v in values.items() if v is not None]
