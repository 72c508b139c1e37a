"""The picture of measured rows: its lines, axes and references."""

import pytest
from helpers.bench_rows import row

from jet_export.bench.picture import draw, pyplot, scale_speeds, series


def test_a_line_for_each_model_precision_and_batch() -> None:
    rows = [row(1, 5, context=8), row(1, 9, context=4), row(2, 7), row(1, 3, precision="fp8")]
    assert series(rows, "decode")["jet-2b bf16, batch 1"] == [(4, 9), (8, 5)]
    assert len(series(rows, "prefill")) == 3 and series(rows, "prefill")["jet-2b fp8, batch 1"] == [(4096, 6)]


def test_too_many_lines_become_two_per_model() -> None:
    rows = [
        row(b, b, context=c, model=m)
        for m in ("jet-2b", "qwen3-1.7b")
        for c, most in ((8, 64), (4, 1024))
        for b in (1, 2, 4, 8, 16, 32, 64, most)
    ]
    lines = series(rows, "decode")
    assert lines["jet-2b bf16, largest batch (1024, 64)"] == [(4, 1024), (8, 64)]
    assert lines["Qwen3-1.7B-shaped bf16, batch 1"] == [(4, 1), (8, 1)] and len(lines) == 4


def test_the_picture_names_the_source_of_every_reference(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.axes import Axes

    labels: list[str] = []
    plot = Axes.plot

    def recorded(self, *args, **kwargs):
        labels.append(str(kwargs.get("label")))
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", recorded)
    environment = {"gpu": "none", "torch": "2", "date": "today", "commit": "abc"}
    draw(tmp_path / "x.png", [row(128, 10_000, context=65536)], environment)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    paper = [x for x in labels if "2,885" in x]
    assert paper and "arXiv 2508.15884" in paper[0] and "H100" in paper[0]
    assert any("published code as we ran it" in x for x in labels)


@pytest.mark.parametrize("speeds", [(82.0, 394.0), (82.0, 9e4), (3681.0, 4288.0), (5.0, 5.0)])
def test_the_speed_axis_has_numbers(speeds: tuple[float, float]) -> None:
    """At least three ticks in tokens/s across the whole range; from 0 unless that spans a factor of ten."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure, axis = pyplot().subplots()
    axis.plot([256, 1024], speeds)
    scale_speeds(axis)
    shown = [float(t.get_text().replace(",", "")) for t in axis.get_yticklabels()]
    low, high = axis.get_ylim()
    visible = [t for t in shown if low <= t <= high]
    assert len(visible) >= 3 and low <= min(speeds) and max(speeds) <= high
    assert (low == 0) == (max(speeds) < 10 * min(speeds))
    pyplot().close(figure)
