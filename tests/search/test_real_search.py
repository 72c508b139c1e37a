"""`jet-export search` as users run it: two of jet-tiny's layers as real CPU engines, killed in the middle, and resumed.
An attention layer's cell and a whole model would be two more packages each: test_cells.py and test_search.py have them
in the eager engine and in a stand-in, a GPU's search here has both."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.inductor_headers import share_headers

from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.model.hub import PRESETS

SPACE = """
[jet]
sizes = ["128x64x2", "256x256x4"]
[attention]
layout = ["jj"]
[measure]
batch = [2]
context = [128]
prefill_chunk = 64
new_tokens = 16
layers = 1
"""


def write_inputs(folder: Path, space: str = SPACE, layers: tuple[str, ...] = ("jet", "jet")) -> None:
    """Widths as of jet-tiny but a short vocabulary, and a space."""
    config = replace(PRESETS["jet-tiny"](), layer_types=layers, vocab_size=512)
    config.save(folder / "small.json")
    (folder / "space.toml").write_text(space)


def command(*more: str) -> list[str]:
    main = "from jet_export.cli.app import main; main()"
    words = [
        "search",
        "--model",
        "small.json",
        "--device",
        "cpu",
        "--space",
        "space.toml",
        "--whole",
        "0",
        "--jobs",
        "1",
    ]
    return [sys.executable, "-c", main, *words, *more]


def rows(database: Path) -> dict[tuple[str, str], tuple[float, str]]:
    if not database.exists():
        return {}
    with sqlite3.connect(database, timeout=60) as db:
        try:
            found = db.execute("select kind, phase, median_ms, measured_at from measurements").fetchall()
        except sqlite3.OperationalError:  # not created yet
            return {}
    return {(kind, phase): (ms, at) for kind, phase, ms, at in found}


@pytest.mark.timeout(600)
def test_a_killed_search_goes_on_with_real_engines(tmp_path) -> None:
    write_inputs(tmp_path)
    share_headers(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    database = tmp_path / "searches" / "measurements.db"
    first = subprocess.Popen(
        command(), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while len(rows(database)) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)  # into the next build
    first.send_signal(signal.SIGKILL)
    _, err = first.communicate()
    kept = rows(database)
    assert set(kept) == {("base", "decode"), ("base", "prefill")}, err.decode()
    assert not (tmp_path / "searches" / "small-inductor" / "best.json").exists()

    second = subprocess.run(
        command("--resume"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert second.returncode == 0, second.stderr
    after = rows(database)
    assert {k: after[k] for k in kept} == kept  # not measured again
    kinds = ("base", "jet")
    assert set(after) == {(kind, phase) for kind in kinds for phase in ("decode", "prefill")}
    base, jet = (after[kind, "decode"][0] for kind in kinds)
    assert jet > base > 0

    out = tmp_path / "searches" / "small-inductor"
    results = json.loads((out / "results.json").read_text())
    able, refused = results["points"]
    assert able["decode_ms"] == pytest.approx(base + 2 * (jet - base))
    assert able["chosen"] and able["point"].startswith("128x64x2")
    assert "cache" in refused["refused"] and refused["decode_ms"] is None
    best = JetNemotronConfig.from_json_file(out / "best.json")
    assert best.jet_dims(0) == JetDims(2, 128, 64) and best.layer_types == ("jet", "jet")
    assert [p.name for p in (tmp_path / "searches" / "measurements.db.engines").rglob("*.pt2")] == []


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_a_search_on_a_gpu_predicts_the_whole_model(tmp_path) -> None:
    space = SPACE.replace('["128x64x2", "256x256x4"]', '["64x64x4", "128x64x2"]').replace("layers = 1", "layers = 2")
    write_inputs(tmp_path, space.replace('["jj"]', '["jaj"]'), ("jet", "attn", "jet"))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def search(*more: str) -> dict:
        words = command("--device", "cuda", "--whole", "1", "--jobs", "2", *more)
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "searches" / "small-inductor" / "results.json").read_text())

    results = search()
    if results["noisy_measurements"]["over 10 %"] or results["left_out"]:  # other tests share the host
        results = search("--resume", "--remeasure")
    errors = {p["phase"]: abs(p["error"]) for p in results["predictions"]}
    assert set(errors) == {"decode", "prefill"}
    assert errors["decode"] < 0.25  # a sum of layers that is no prediction would be off by a layer or more
