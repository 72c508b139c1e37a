"""benchmarks/engine/load_time.py on the tests' one compiled bundle: every stage is there, and they add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.bundles import tiny_bundle
from helpers.paths import BENCHMARKS

SCRIPT = BENCHMARKS / "engine/load_time.py"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory)


def test_stages(bundle, tmp_path) -> None:
    output = tmp_path / "load.json"
    command = [sys.executable, str(SCRIPT), str(bundle), "--runs", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["environment"]["gpu"]
    ((staged,), (whole,)) = result["seconds"]["staged"], result["seconds"]["whole"]
    assert all(0 <= t < 100 for t in (*staged.values(), *whole.values()))
    for name in ("import torch", "check hashes", "prefill.pt2: load", "first prefill, 512 tokens", "first decode"):
        assert staged[name] > 0 and name in done.stdout
    assert list(whole)[-2:] == ["LLM(bundle)", "generate 1 token"]


def test_another_backend_is_named(tmp_path, bundle) -> None:
    values = json.loads((bundle / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "backend": {"name": "onnx"}}))
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "a bundle of backend onnx; this times inductor's" in done.stderr
