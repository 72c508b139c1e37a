"""benchmarks/serving/simulate_truth.py: its three commands are ones that the tools take, and what is off is named."""

import sys
from pathlib import Path

import pytest
from helpers.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("serving/simulate_truth.py")


def test_the_commands_are_taken(script, monkeypatch, tmp_path: Path) -> None:
    bench, load, check = script.commands(script.parse([str(tmp_path), "--output", str(tmp_path / "out")]))
    assert bench[3:5] == ["bench", str(tmp_path)] and bench[-1] == str(tmp_path / "out")
    serve_load = load_script("serving/serve_load.py")
    monkeypatch.setattr(sys, "argv", load[1:])
    taken = serve_load.parse()
    assert taken.loads == [0.5, 0.8, 1.1] and taken.concurrency == [64] and taken.poisson_seconds == 60
    assert check[2] == str(taken.output) and check[check.index("--measured") + 1].endswith("out/bench.json")


def test_what_is_off_is_named(script) -> None:
    near = {name: {"off": -0.15} for name in script.ASKED}
    rows = [{"part": "load 0.5", **near}, {"part": "load 1.1", **near, "tpot_ms p99": {"off": 0.31}}]
    assert script.verdict(rows) == ["load 1.1: tpot_ms p99 off by +31%"]
    assert script.verdict(rows[:1]) == []
