"""Long work in lines, and as bars in a terminal."""

import io
import sys

import pytest
from helpers.clock import Clock

from jet_export.utils import progress as module
from jet_export.utils.progress import Progress, hub_bars


def in_lines() -> tuple[Progress, list[str], Clock]:
    lines: list[str] = []
    clock = Clock()
    return Progress(lines.append, bars=False, clock=clock), lines, clock


def test_a_stage_is_a_line_at_either_end() -> None:
    progress, lines, clock = in_lines()
    with progress.stage("load weights", expected=1.0):
        clock.now += 2.5
    assert lines == ["  load weights ...", "  load weights: 2.5 s"]


def test_counted_work_says_now_and_then_how_long_is_left() -> None:
    progress, lines, clock = in_lines()
    with progress.stage("calibrate", 10) as stage:
        for _ in range(10):
            clock.now += 16
            stage.advance()
    told = ["  calibrate: 2/10, 128 s left", "  calibrate: 4/10, 96 s left", "  calibrate: 6/10, 64 s left"]
    assert lines == ["  calibrate ...", *told, "  calibrate: 8/10, 32 s left", "  calibrate: 160.0 s"]


def test_work_with_lines_of_its_own_has_no_others() -> None:
    progress, lines, clock = in_lines()
    with progress.stage("measure", 2, lines=False) as stage:
        clock.now += 100
        stage.advance()
    assert lines == []


def test_a_stage_that_fails_has_not_ended() -> None:
    progress, lines, _ = in_lines()
    with pytest.raises(ValueError), progress.stage("compile"):
        raise ValueError
    assert lines == ["  compile ..."]


def test_bars_in_a_terminal(monkeypatch) -> None:
    """One display, a bar a stage, the time left; they go when the stages end, also where one fails."""
    screen = io.StringIO()
    lines: list[str] = []
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(lines.append, bars=True)

    def shown() -> list[str]:
        assert module._display is not None
        return [task.description for task in module._display.tasks]

    with progress.stage("measure", 4) as outer:
        outer.advance(2)
        with pytest.raises(ValueError), progress.stage("build", expected=500):
            assert shown() == ["measure", "build"]
            module._display.refresh()  # type: ignore[union-attr]
            raise ValueError
        assert shown() == ["measure"]
    text = screen.getvalue()
    assert "measure" in text and "2/4, 0:00 left" in text and "about 8:20 left" in text
    assert module._display is None and len(lines) == 1 and lines[0].startswith("  measure: ")


def test_a_download_counts_the_bytes_that_have_come() -> None:
    progress, lines, clock = in_lines()
    with progress.stage("download") as stage:
        bars = hub_bars(stage)
        received = bars(desc="Reconstructing", total=0, unit="B", unit_scale=True)
        other = bars(desc="Transferring", total=0, unit="B")
        files = bars(total=3)
        received.total += 4_000_000_000
        clock.now += 40
        received.update(1_000_000_000)
        other.update(5)
        files.update(1)
        assert (stage.done, stage.total) == (1_000_000_000, 4_000_000_000)
    assert lines[1] == "  download: 1.0 GB of 4.0 GB, 120 s left"
