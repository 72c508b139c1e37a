"""The charts of a PostNAS report, drawn by plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jet_export.search.charts import ACCENT, CHOSEN, GREY, PAPER, html, plotly

COLOURS = (CHOSEN, ACCENT, PAPER, "#2ca02c", "#9467bd", "#8c564b")


def importance(r: Mapping[str, Any]) -> str:
    """A heat map: tasks by layers, each task on a scale of its own."""
    go = plotly()
    names, layers = list(r["importance"]), list(range(r["layers"]))
    gains = [r["importance"][n] for n in names]
    names, gains = [*names, "KL lowered"], [*gains, [r["kl"]["none"] - x for x in r["kl"]["single"]]]
    shades = [[x / (max(map(abs, row)) or 1.0) for x in row] for row in gains]
    about = [[f"{n}, layer {i}: {row[i]:+.4g}" for i in layers] for n, row in zip(names, gains, strict=True)]
    figure = go.Figure(
        go.Heatmap(
            z=shades, x=layers, y=names, zmid=0, colorscale="RdBu_r", text=about,
            hovertemplate="%{text}<extra></extra>", colorbar={"title": "of the task's largest"},
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="layer that keeps its attention", dtick=1)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return html(figure, height=180 + 40 * len(names))


def placements(r: Mapping[str, Any]) -> str:
    """Each task's value by the number of attention layers, a line a method; the teacher as a dashed line."""
    go = plotly()
    from plotly.subplots import make_subplots

    tasks, rows = r["tasks"], r["placements"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = make_subplots(1, len(tasks), subplot_titles=[f"{n}, {k}" for n, k in tasks.items()])
    for column, (name, key) in enumerate(tasks.items(), 1):
        for colour, method in zip(COLOURS * len(methods), methods, strict=False):
            mine = [row for row in rows if row["method"] == method]
            line = go.Scatter(
                x=[row["keep"] for row in mine], y=[row["scores"][name][key] for row in mine], name=method,
                legendgroup=method, showlegend=column == 1, mode="lines+markers", marker={"color": colour},
                text=[f"layers {' '.join(map(str, row['attention'])) or 'none'}" for row in mine],
                hovertemplate=f"{method}, %{{text}}: %{{y:.4g}}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(line, 1, column)
        figure.add_hline(y=r["teacher"][name][key], line={"color": GREY, "dash": "dash"}, row=1, col=column)
        figure.update_xaxes(title_text="attention layers", row=1, col=column)
    return html(figure)


def candidates(rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, str]) -> str:
    """Each task's value, a dot a candidate and seed."""
    go = plotly()
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(tasks), shared_yaxes=True, subplot_titles=[f"{n}, {k}" for n, k in tasks.items()])
    for column, (name, key) in enumerate(tasks.items(), 1):
        dots = go.Scatter(
            x=[r["scores"][name][key] for r in rows], y=[r["name"] for r in rows], mode="markers", showlegend=False,
            marker={"color": [CHOSEN if r["name"] == "jet" else ACCENT for r in rows], "size": 9},
            text=[f"{r['name']}, seed {r['seed']}" for r in rows],
            hovertemplate="%{text}: %{x:.4g}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(dots, 1, column)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return html(figure, height=160 + 26 * len({r["name"] for r in rows}))
