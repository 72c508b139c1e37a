"""The charts of a simulation's report, drawn by plotly: distributions of the latencies, and the run over time."""

from __future__ import annotations

import numpy as np

from jet_export.search.charts import ACCENT, CHOSEN, GREY, PAPER, html, plotly
from jet_export.simulate.cluster import Outcome
from jet_export.simulate.measures import tpot, ttft

POINTS, WINDOWS = 400, 120  # of a distribution; of the time


def latencies(outcome: Outcome) -> str:
    """The share of requests that took at most so long: TTFT, TPOT, end to end."""
    go = plotly()
    from plotly.subplots import make_subplots

    good = [j for j in outcome.jobs if not j.failed]
    kinds = {
        "time to first token": [ttft(j) for j in good],
        "time per output token": [t for j in good if (t := tpot(j)) is not None],
        "end to end": [j.end - j.arrival.at for j in good],
    }
    figure = make_subplots(1, len(kinds), shared_yaxes=True, subplot_titles=list(kinds))
    shares = np.linspace(0, 1, POINTS)
    for column, (name, values) in enumerate(kinds.items(), 1):
        x = 1e3 * np.quantile(values or [0.0], shares)
        line = go.Scatter(x=x, y=shares, name=name, line={"color": ACCENT}, showlegend=False)
        figure.add_trace(line, 1, column)
        figure.update_xaxes(title_text="ms", type="log", row=1, col=column)
    figure.update_yaxes(title_text="share of requests", tickformat=".0%", row=1, col=1)
    return html(figure)


def over_time(outcome: Outcome) -> str:
    """Arrivals, replicas, and TTFT by the time of arrival."""
    go = plotly()
    from plotly.subplots import make_subplots

    good = [j for j in outcome.jobs if not j.failed]
    at = np.array([j.arrival.at for j in good] or [0.0])
    first = 1e3 * np.array([ttft(j) for j in good] or [0.0])
    edges = np.linspace(0, max(outcome.seconds, 1e-3), WINDOWS + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1]
    index = np.minimum((at / width).astype(int), WINDOWS - 1)
    windows = [first[index == i] for i in range(WINDOWS)]
    figure = make_subplots(3, 1, shared_xaxes=True, subplot_titles=["arrivals/s", "replicas", "TTFT, ms"])
    rates = np.bincount(index, minlength=WINDOWS) / width
    figure.add_trace(go.Scatter(x=middles, y=rates, line={"color": GREY}, showlegend=False), 1, 1)
    times = [t for t, _ in outcome.scale] + [outcome.seconds]
    counts = [n for _, n in outcome.scale]
    steps = go.Scatter(x=times, y=[*counts, counts[-1]], line={"color": PAPER, "shape": "hv"}, showlegend=False)
    figure.add_trace(steps, 2, 1)
    for share, colour in ((0.5, ACCENT), (0.99, CHOSEN)):
        y = [float(np.quantile(w, share)) if len(w) else None for w in windows]
        figure.add_trace(go.Scatter(x=middles, y=y, name=f"p{100 * share:g}", line={"color": colour}), 3, 1)
    figure.update_xaxes(title_text="seconds", row=3, col=1)
    return html(figure, height=640)
