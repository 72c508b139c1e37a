"""TensorRT for RTX, where installed, loads the library, parses a graph with both nodes and builds it on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("tensorrt_rtx", "onnx")),
    reason="needs tensorrt-rtx and onnx (pip install tensorrt-rtx onnx)",
)


def build(library: Path, folder: Path, attention: str, sm: str) -> dict:
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec and spec.origin
    libs = Path(spec.origin).parent  # holds libtensorrt_rtx.so.1; the ONNX parser opens it by the name without .1
    (folder / "libtensorrt_rtx.so").symlink_to(libs / "libtensorrt_rtx.so.1")
    env = os.environ | {"LD_LIBRARY_PATH": f"{folder}:{libs}", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, str(HERE / "rtx_build.py"), str(library), attention, sm]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("sm", ["8.9", "12.0"])
def test_both_nodes_build(mini, tmp_path, sm):
    found = build(mini.library, tmp_path, "JetAttention", sm)
    assert found["parsed"] and found["layers"] == ["PLUGIN_V3"] * 2 and found["plan"] > 0, found


def test_a_node_called_attention_is_taken_for_onnx_s_own(mini, tmp_path):
    found = build(mini.library, tmp_path, "Attention", "8.9")
    assert not found["parsed"]
    assert any("TensorRT only supports Attention nodes with one output" in text for text in found["errors"])
