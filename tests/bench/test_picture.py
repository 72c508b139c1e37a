"""The picture of measured rows: its lines, axes and references."""

from itertools import pairwise

import pytest
from helpers.bench_rows import row

from jet_export.bench.picture import Label, draw, name_ends, pyplot, scale_speeds, series


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
    from matplotlib.figure import Figure

    marks: list[str] = []
    notes: list[str] = []
    annotate, write = Axes.annotate, Figure.text

    def recorded_mark(self, text, *args, **kwargs):
        marks.append(text)
        return annotate(self, text, *args, **kwargs)

    def recorded_note(self, x, y, text, *args, **kwargs):
        notes.extend(text.splitlines())
        return write(self, x, y, text, *args, **kwargs)

    monkeypatch.setattr(Axes, "annotate", recorded_mark)
    monkeypatch.setattr(Figure, "text", recorded_note)
    environment = {"gpu": "none", "torch": "2", "date": "today", "commit": "abc"}
    draw(tmp_path / "x.png", [row(128, 10_000, context=65536)], environment)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "2,885 at B128 (1)" in marks and "1,042 at B128 (2)" in marks and "94,200 at B16 (2)" in marks
    assert any(n.startswith("(1) paper (arXiv 2508.15884), its H100") for n in notes)
    assert any(n.startswith("(2) published code as we ran it") for n in notes)


def test_names_of_lines_do_not_overlap() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.text import Text

    figure, axis = pyplot().subplots()
    ends = (100.0, 101.0, 101.0, 400.0)
    for y in ends:
        axis.plot([1, 2], [50, y])
    name_ends(axis, [Label(y, f"line to {y}", "black") for y in ends])
    figure.canvas.draw()
    boxes = sorted((Text.get_window_extent(text) for text in axis.texts), key=lambda box: box.y0)
    assert len(boxes) == 4 and all(a.y1 <= b.y0 for a, b in pairwise(boxes))
    pyplot().close(figure)


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
