"""report.html of a PostNAS run, a self-contained page: what the steps' result.json hold, with charts (no network).

python -m jet_export.postnas.report OUTPUT      # again, of the results in a run's directory
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jet_export.postnas import charts
from jet_export.postnas.recipe import STEPS
from jet_export.search.charts import library, plotly
from jet_export.search.report import NO_CHARTS, POLICY, STYLE, table
from jet_export.utils.environment import environment
from jet_export.utils.files import write_atomically

Result = dict[str, Any]


def report(results: Mapping[str, Result], where: Mapping[str, Any]) -> str:
    """The page of the steps that are whole. `where`: the environment."""
    drawn = plotly() is not None
    sections = [SECTIONS[step](results[step], drawn) for step in STEPS if step in results]
    missing = [step for step in STEPS if step not in results]
    note = f"<p>Not run yet: {', '.join(missing)}.</p>" if missing else ""
    where_table = table(["", ""], [[k, v] for k, v in where.items()])
    title = "jet-export postnas"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>'
    script = f"<script>{library()}</script>" if drawn else ""
    body = f"<h1>{title}</h1>{note}{'' if drawn else NO_CHARTS}{''.join(sections)}<h2>Environment</h2>{where_table}"
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style>{script}</head><body>{body}</body></html>\n'
    )


def placement_section(r: Result, drawn: bool) -> str:
    kept = ", ".join(map(str, r["attention"])) or "none"
    out = (
        f"<h2>Placement</h2><p>Attention stays in layers <b>{kept}</b> (from 0) of {r['layers']}: the best by "
        f"{escape(r['objective'])} of {r['evaluated']} placements that were scored as paths of one supernet.</p>"
    )
    if drawn:
        out += "<h3>Importance of layers</h3>" + charts.importance(r) + "<h3>Placements</h3>" + charts.placements(r)
    heads = ["method", "kept", "layers", "combined", *_score_heads(r["tasks"])]
    rows = [
        [p["method"], p["keep"], " ".join(map(str, p["attention"])), f"{p['value']:.4f}", *_scores(p["scores"], r)]
        for p in r["placements"]
    ]
    rows.append(["teacher", r["layers"], "all", "", *_scores(r["teacher"], r)])
    without = ", ".join(r.get("left_out", []))  # which results of before do not say
    tasks = f"tasks but {escape(without)}" if without else "tasks"
    note = (
        "<p>Importance: what keeping this layer's attention alone gains over none, by task. combined: share of the way "
        f"from no attention layer to the teacher, mean over {tasks}. Scores are the supernet's, before any "
        "retrofit.</p>"
    )
    return out + note + table(heads, rows)


def block_section(r: Result, drawn: bool) -> str:
    note = (
        "<p>One budget of tokens and equal states for all. tokens/s: of this run's training on this machine; a block "
        "whose form is torch has faster kernels elsewhere.</p>"
    )
    return "<h2>Blocks</h2>" + note + _candidates(r["rows"], drawn, ("form",))


def design_section(r: Result, drawn: bool) -> str:
    return "<h2>Design</h2><p>The JetBlock with one choice changed.</p>" + _candidates(r["rows"], drawn, ())


def shapes_section(r: Result, drawn: bool) -> str:
    how = "and the latency of engines measured here" if r["measured"] else "alone; no engine was measured"
    out = f"<h2>Shapes</h2><p><b>{escape(r['chosen'])}</b>: {escape(r['why'])}, by scores {how}.</p>"
    for rung, rows in enumerate(r["rungs"]):
        out += f"<h3>Rung {rung}: {rows[0]['tokens']:,} tokens each</h3>" + _candidates(rows, drawn, ("size", "value"))
    return out


def retrofit_section(r: Result, drawn: bool) -> str:
    names = list(r["scores"])
    rows = [
        [name, *(_form(values.get(key)) for key in ("loss", "accuracy"))]
        for who, scores in (("", r["scores"]), ("teacher: ", r["teacher"]))
        for name, values in ((who + n, scores[n]) for n in names)
    ]
    model = f"{escape(r['student_layers'])} (a: attention, j: JetBlock), JetBlocks of {escape(r['size'])}"
    return f"<h2>Retrofit</h2><p>{model}: {r['steps']:,} steps, {r['tokens']:,} tokens.</p>" + table(
        ["task", "loss", "accuracy"], rows
    )


def _candidates(rows: Sequence[Result], drawn: bool, more: Sequence[str]) -> str:
    tasks = {name: "accuracy" if "accuracy" in s else "loss" for name, s in rows[0]["scores"].items()}
    stages = list(rows[0]["training_loss"])
    heads = ["", "seed", *more, "state bytes", "mixer parameters", *(f"training: {s}" for s in stages)]
    heads += [*_score_heads(tasks), "tokens/s"]
    cells = [
        [
            r["name"], r["seed"], *(_form(r[m]) for m in more), f"{r['state_bytes']:,}", f"{r['mixer_parameters']:,}",
            *(_form(r["training_loss"].get(s)) for s in stages), *_scores(r["scores"], {"tasks": tasks}),
            f"{r['tokens_per_s']:,.0f}",
        ]
        for r in rows
    ]  # fmt: skip
    return (charts.candidates(rows, tasks) if drawn else "") + table(heads, cells)


def _score_heads(tasks: Mapping[str, str]) -> list[str]:
    return [f"{name}: {key}" for name, counts in tasks.items() for key in _keys(counts)]


def _scores(scores: Mapping[str, Mapping[str, float]], r: Result) -> list[str | None]:
    return [_form(scores[name].get(key)) for name, counts in r["tasks"].items() for key in _keys(counts)]


def _keys(counts: str) -> tuple[str, ...]:
    return ("accuracy", "loss") if counts == "accuracy" else ("loss",)


def _form(value: Any) -> str | None:
    return f"{value:.4f}" if isinstance(value, float) else None if value is None else str(value)


SECTIONS = {
    "placement": placement_section,
    "block": block_section,
    "design": design_section,
    "shapes": shapes_section,
    "retrofit": retrofit_section,
}


def main(directory: str) -> None:
    output = Path(directory)
    results = {s: json.loads(p.read_text("utf-8")) for s in STEPS if (p := output / s / "result.json").exists()}
    write_atomically(output / "report.html", report(results, environment()))
    print(f"written: {output / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
