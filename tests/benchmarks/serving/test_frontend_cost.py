"""benchmarks/serving/frontend_cost.py: every event of every stream is read."""

import json
import subprocess
import sys

import pytest
from helpers.paths import BENCHMARKS

pytest.importorskip("fastapi")


def test_a_short_run() -> None:
    script = str(BENCHMARKS / "serving/frontend_cost.py")
    options = ["--frontends", "1", "--streams", "4", "--rounds", "2", "--tokens", "5", "--step-ms", "1"]
    run = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    row = json.loads(run.stdout)
    assert row["events"] == 4 * 2 * 5 and row["events_per_s"] > 0
