"""Measurements disturbed by other load: detected, left out of sums, measured again."""

import csv
import json
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_executor import SPACE, prepared, searched

from jet_export.search.cells import Cell, base_cell
from jet_export.search.database import Entry
from jet_export.search.output import write_results
from jet_export.search.terminal import summary_lines
from jet_export.search.worker import repeat_until_confirmed
from jet_export.utils.errors import JetExportError


def base_slow(phase: str):
    """Makes the engine without layers a hundred times slower in this phase, in every repeat."""
    return lambda cell, p: [100.0, 100.0] if cell.kind == "base" and p == phase else [1.0, 1.01]


def shaky(cell: Cell, phase: str) -> list[float]:
    return [1.0, 1.3] if cell.kind == "jet" and "64x16x2" in str(cell) else [1.0, 1.05]


def left_out(path) -> list[str]:
    return json.loads((path / "results.json").read_text())["left_out"]


def test_cells_with_unconfirmed_repeats_are_measured_again(tmp_path) -> None:
    first = prepared(tmp_path, whole=0)
    executor = searched(first, repeats=shaky)
    noisy = 8  # two phases of four cases of one of the engines
    assert (first.state.noisy, first.state.repeated) == (noisy, 8 * len(executor.builds))
    (line,) = [line for line in summary_lines(first) if line.startswith("noise: ")]
    assert "noise: 8 of" in line and "--resume --remeasure" in line

    usual = prepared(tmp_path, whole=0, resume=True)
    assert not searched(usual).builds
    again = prepared(tmp_path, whole=0, resume=True, remeasure=True)
    executor = searched(again)
    (doubtful,) = [cell for cell in first.state.layers if "64x16x2" in str(cell)]
    assert set(executor.builds) == {base_cell(first.spec.preset).key, doubtful.key}
    assert set(executor.measured.values()) == {1}
    repeated = 8 * (len(first.state.layers) - 1)  # the engines measured just now had one repeat
    assert (again.state.noisy, again.state.repeated) == (0, repeated)


def test_what_stays_noisy_is_measured_again_once(tmp_path) -> None:
    searched(prepared(tmp_path, whole=0), repeats=shaky)
    again = prepared(tmp_path, whole=0, resume=True, remeasure=True)
    executor = searched(again, repeats=shaky)
    assert set(executor.measured.values()) == {1} and again.state.noisy == 8 and again.chosen


def test_a_phase_with_negative_layers_has_no_predictions(tmp_path) -> None:
    search = prepared(tmp_path, whole=1)
    searched(search, repeats=base_slow("prefill"))
    write_results(search)
    with open(search.spec.output / "points.csv", newline="") as file:
        points = [r for r in csv.DictReader(file) if not r["refused"]]
    assert points and all(r["tokens_per_s"] and not r["prefill_tokens_per_s"] for r in points)
    with open(search.spec.output / "layers.csv", newline="") as file:
        assert {r["phase"] for r in csv.DictReader(file)} == {"decode"}
    results = json.loads((search.spec.output / "results.json").read_text())
    assert {p["phase"] for p in results["predictions"]} == {"decode"}
    assert len(left_out(search.spec.output)) == 4  # of a grid of four
    assert all("prefill at B" in why and "was the machine in use?" in why for why in left_out(search.spec.output))
    assert sum(line.startswith("left out: prefill at B") for line in summary_lines(search)) == 4
    assert "Left out: prefill at B4 256" in (search.spec.output / "report.html").read_text()

    idle = prepared(tmp_path, whole=1, resume=True, remeasure=True)
    searched(idle)
    write_results(idle)
    assert not left_out(idle.spec.output)
    assert all(e.predicted and len(e.predicted) == 8 for e in idle.state.evaluations.values())


def test_inconsistent_decode_leaves_no_point(tmp_path) -> None:
    with pytest.raises(
        JetExportError, match=r"decode at B4 256: .* the engine without layers .* was the machine in use"
    ):
        searched(prepared(tmp_path), repeats=base_slow("decode"))


def test_an_unknown_prefill_misses_its_target(tmp_path) -> None:
    space = SPACE + "[constraints]\nprefill_tokens_per_s = 1\n"
    with pytest.raises(JetExportError, match="prefill: not known, target 1 tokens/s"):
        searched(prepared(tmp_path, space), repeats=base_slow("prefill"))


@pytest.mark.parametrize(
    ("decode", "prefill", "runs"),
    [
        ([1.0, 1.05, 2.0], [5.0, 5.0, 5.0], 3),
        ([1.0, 1.2, 1.3, 1.05], [5.0] * 4, 4),
        ([1.0, 1.0, 1.0, 1.0, 1.0], [5.0, 6.0, 7.0, 8.0, 5.4], 5),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [5.0] * 6, 6),
        ([1.0], [5.0], 1),
    ],
)
def test_repeats_go_on_until_two_agree(decode, prefill, runs) -> None:
    def run(d: float, p: float) -> SimpleNamespace:
        case = SimpleNamespace(batch=2, context=50)
        step, call = SimpleNamespace(median=d, p90=d), SimpleNamespace(median=p, p90=p)
        return SimpleNamespace(
            case=case,
            step=step,
            prefill_call=call,
            prefill_tokens_per_s=1e5 / p,
            filled_by="prefill",
            state_bytes=0,
            peak_bytes=0,
        )

    every: Any = iter([run(d, p) for d, p in zip(decode, prefill, strict=True)])
    first = [next(every) for _ in range(min(3, len(decode)))]
    got = repeat_until_confirmed(first, lambda: [next(every)])
    assert next(every, None) is None
    assert [len(e.details["every_ms"]) for e in got] == [runs, runs]
    assert got[0].median_ms == min(decode) and got[1].median_ms == pytest.approx(min(prefill))


def entry(*every_ms: float, p90_ms: float = 1.0, **details: int) -> Entry:
    return Entry(
        batch=1,
        context=64,
        phase="decode",
        median_ms=min(every_ms, default=1.0),
        p90_ms=p90_ms,
        details={**({"every_ms": list(every_ms)} if every_ms else {}), **details},
    )


def test_one_repeat_neither_confirms_nor_contradicts() -> None:
    assert entry(1.0).confirmed is None
    assert entry().confirmed is None
    assert entry(1.2, 1.0, 1.1).confirmed
    assert entry(1.2, 1.0).confirmed is False


def test_the_faster_of_old_and_new_is_kept() -> None:
    old = entry(1.0, 1.3, p90_ms=1.5, peak_bytes=7)
    slower = entry(1.2, 1.25, p90_ms=1.2, peak_bytes=8)
    both = slower.with_repeats(old)
    assert (both.median_ms, both.p90_ms) == (1.0, 1.5)
    assert both.details == {"every_ms": [1.0, 1.3, 1.2, 1.25], "peak_bytes": 7}
    assert both.confirmed is False
    faster = entry(0.95, 0.99, p90_ms=0.96, peak_bytes=8)
    assert faster.with_repeats(old).median_ms == 0.95 and faster.with_repeats(old).confirmed
    assert slower.with_repeats(None) is slower
