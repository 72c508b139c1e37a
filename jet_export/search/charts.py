"""The charts of report.html, drawn by plotly: hovering over a mark gives its figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from jet_export.utils.console import human

GREY, ACCENT, CHOSEN, PAPER = "#8a8f98", "#1f77b4", "#d62728", "#e08214"
MOST_LABELS = 12  # beside their marks; more would overlap
SIDES = (("top right", "\u2002{}"), ("bottom left", "{}\u2002"))  # in turns, with a space to the mark

Rows = Sequence[dict[str, Any]]


def plotly() -> Any:
    """plotly.graph_objects; None where plotly is not installed."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        return None
    return go


def library() -> str:
    """plotly.js, to be written into the page once."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def front(points: Rows, y: str, y_name: str, title: str) -> str:
    """Throughput against `y`: a line through the front, and what was measured whole beside what was predicted."""
    go = plotly()
    shown = [r for r in points if r["tokens_per_s"] and r[y] is not None]
    on_front = sorted((r for r in shown if r["front"]), key=lambda r: r["tokens_per_s"])
    whole = [r for r in shown if r["whole_tokens_per_s"]]
    chosen = [r for r in shown if r["chosen"]]
    labelled = {r["point"] for r in on_front} if len(on_front) <= MOST_LABELS else {r["point"] for r in chosen}

    def trace(rows: Rows, name: str, x: str = "tokens_per_s", **marks: Any) -> Any:
        about = {"text": [hover(r) for r in rows], "hovertemplate": "%{text}<extra></extra>"}
        return go.Scatter(x=[r[x] for r in rows], y=[r[y] for r in rows], name=name, **about, **marks)

    others = [r for r in shown if not r["front"]]
    figure = go.Figure()
    figure.add_trace(trace(others, "other points", mode="markers", marker={"color": GREY, "size": 8}))
    figure.add_trace(trace(on_front, "front", mode="lines+markers", marker={"color": ACCENT, "size": 9}))
    marks = {"symbol": "diamond-open", "color": ACCENT, "size": 11}
    figure.add_trace(trace(whole, "measured whole", x="whole_tokens_per_s", mode="markers", marker=marks))
    figure.add_trace(trace(chosen, "chosen", mode="markers", marker={"color": CHOSEN, "size": 13, "symbol": "star"}))
    for i, r in enumerate(r for r in on_front if r["point"] in labelled):
        side, form = SIDES[i % 2]
        at = {"x": [r["tokens_per_s"]], "y": [r[y]], "text": [form.format(r["point"])], "textposition": side}
        figure.add_trace(go.Scatter(**at, mode="text", showlegend=False, hoverinfo="skip", cliponaxis=False))
    figure.update_layout(title=title, xaxis_title="tokens/s, whole batch", yaxis_title=y_name)
    return html(figure)


def hover(r: dict[str, Any]) -> str:
    """The figures of a point, a line each."""
    lines = [f"<b>{escape(r['point'])}</b>"]
    for name, value in (
        ("parameters", r["parameters"] and f"{r['parameters']:,}"),
        ("cache a sequence", r["cache_bytes"] and human(r["cache_bytes"])),
        ("score", r["score"] is not None and score(r["score"])),
        ("step", r["decode_ms"] and f"{r['decode_ms']:.4g} ms"),
        ("tokens/s", r["tokens_per_s"] and f"{r['tokens_per_s']:,.0f}"),
        ("prefill tokens/s", r["prefill_tokens_per_s"] and f"{r['prefill_tokens_per_s']:,.0f}"),
        ("measured whole, tokens/s", r["whole_tokens_per_s"] and f"{r['whole_tokens_per_s']:,.0f}"),
        ("prediction error", r["prediction_error"] is not None and f"{r['prediction_error']:+.1%}"),
        ("the paper's tokens/s", r["paper_tokens_per_s"] and f"{r['paper_tokens_per_s']:,}"),
        ("the paper's retrieval, math", r["paper_math"] and f"{r['paper_retrieval']}, {r['paper_math']}"),
    ):
        if value:
            lines.append(f"{name}: {value}")
    return "<br>".join(lines)


def score(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.6g}"


def layers(rows: Rows, batch: int, context: int) -> str:
    """Milliseconds that one layer adds, decode beside prefill."""
    go = plotly()
    from plotly.subplots import make_subplots

    phases = {"decode": f"a decode step of {batch}", "prefill": f"prefill of {batch} x {context}"}
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=list(phases.values()), horizontal_spacing=0.04)
    most = 1
    for column, phase in enumerate(phases, 1):
        at = [r for r in rows if (r["batch"], r["context"], r["phase"]) == (batch, context, phase)]
        most = max(most, len(at))
        bar = go.Bar(
            x=[r["ms"] for r in at],
            y=[r["layer"] for r in at],
            orientation="h",
            marker={"color": ACCENT},
            text=[f"{r['ms']:.4g}" for r in at],
            hovertemplate="%{y}: %{x:.4g} ms<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(bar, 1, column)
        figure.update_xaxes(title_text="ms", row=1, col=column)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return html(figure, height=140 + 26 * most)


def predictions(rows: Rows) -> str:
    """Measured whole against the sum of layers; on the line both are equal."""
    go = plotly()
    from plotly.subplots import make_subplots

    phases = ("decode", "prefill")
    figure = make_subplots(1, 2, subplot_titles=phases)
    for column, phase in enumerate(phases, 1):
        of = [r for r in rows if r["phase"] == phase]
        texts = [f"{r['point']}, B{r['batch']} {r['context']}: {r['error']:+.1%}" for r in of]
        ends = sorted(r[k] for r in of for k in ("predicted_ms", "measured_ms"))
        line = {"color": GREY, "dash": "dash"}
        span = ends[:1] + ends[-1:]
        figure.add_trace(
            go.Scatter(x=span, y=span, mode="lines", line=line, hoverinfo="skip", showlegend=False), 1, column
        )
        dots = go.Scatter(
            x=[r["predicted_ms"] for r in of],
            y=[r["measured_ms"] for r in of],
            mode="markers",
            marker={"color": ACCENT, "size": 9},
            text=texts,
            hovertemplate="%{text}<br>predicted %{x:.4g} ms, measured %{y:.4g} ms<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(dots, 1, column)
        figure.update_xaxes(title_text="predicted, ms", row=1, col=column)
        figure.update_yaxes(title_text="measured, ms", row=1, col=column)
    return html(figure)


def beside_paper(points: Rows) -> str:
    """Throughput of the paper's points as percent of the fastest, ours and the paper's, and the paper's scores."""
    go = plotly()
    from plotly.subplots import make_subplots

    shown = [r for r in points if r["tokens_per_s"] and r["paper_tokens_per_s"]]
    titles = ("tokens/s, % of the fastest", "the paper's retrieval, %", "the paper's math, %")
    figure = make_subplots(1, 3, subplot_titles=titles)
    names = [r["point"] for r in shown]

    def line(values: Sequence[float | None], name: str, colour: str, texts: Sequence[str], legend: bool = False) -> Any:
        about = {"text": texts, "hovertemplate": f"%{{x}}, {name}: %{{text}}<extra></extra>"}
        marks = {"color": colour, "size": 9}
        return go.Scatter(x=names, y=values, name=name, mode="lines+markers", marker=marks, showlegend=legend, **about)

    for key, name, colour in (
        ("tokens_per_s", "ours, here", ACCENT),
        ("paper_tokens_per_s", "the paper's H100", PAPER),
    ):
        most = max(r[key] for r in shown)
        shares = [100 * r[key] / most for r in shown]
        texts = [f"{r[key]:,.0f} tokens/s, {share:.1f} %" for r, share in zip(shown, shares, strict=True)]
        figure.add_trace(line(shares, name, colour, texts, legend=True), 1, 1)
    for column, name in enumerate(("retrieval", "math"), 2):
        values = [r[f"paper_{name}"] for r in shown]
        figure.add_trace(line(values, name, PAPER, [f"{v} %" for v in values]), 1, column)
    return html(figure)


def html(figure: Any, height: int = 430) -> str:
    margin = {"l": 70, "r": 20, "t": 60, "b": 50}
    legend = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    figure.update_layout(template="plotly_white", height=height, margin=margin, legend=legend)
    options = {"displaylogo": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=options))
