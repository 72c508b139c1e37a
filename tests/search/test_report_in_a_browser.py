"""report.html in a real browser: its charts are drawn, from the file alone."""

import json
from pathlib import Path

import pytest
from helpers.browser import browser
from helpers.paths import BENCHMARKS

from jet_export.search.report import main

pytest.importorskip("plotly")


def test_charts_are_drawn_and_hovering_gives_the_point(tmp_path: Path) -> None:
    results = BENCHMARKS / "results/h100/search/results.json"
    main(str(results), str(tmp_path / "report.html"))
    with browser(tmp_path / "profile") as chromium:
        chromium.open((tmp_path / "report.html").as_uri())
        charts = "[...document.querySelectorAll('.js-plotly-plot')]"
        chromium.wait(f"{charts}.length === 4 && {charts}.every(c => c.querySelector('.main-svg'))")
        chromium.evaluate(
            "Plotly.Fx.hover(document.querySelector('.js-plotly-plot'), [{curveNumber: 1, pointNumber: 0}])"
        )
        said = chromium.wait("document.querySelector('.hoverlayer').textContent")
        assert chromium.console == []  # its policy allows no more than what is in it
    slowest = min((r for r in json.loads(results.read_text())["points"] if r["front"]), key=lambda r: r["tokens_per_s"])
    assert slowest["point"] in said and f"{slowest['tokens_per_s']:,.0f}" in said
