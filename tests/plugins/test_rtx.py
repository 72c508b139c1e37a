"""TensorRT for RTX, where installed, loads the library, parses a graph with both nodes and builds it on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jet_export.build import run_build
from jet_export.bundle import Manifest
from jet_export.plan import BuildOptions, make_plan
from jet_export.plugins.cases import model_cases
from jet_export.plugins.library import NAME, build_library

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("tensorrt_rtx", "onnx")),
    reason="needs tensorrt-rtx and onnx (pip install tensorrt-rtx onnx)",
)


def build(script: str, folder: Path, *arguments: str) -> dict:
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec and spec.origin
    libs = Path(spec.origin).parent  # holds libtensorrt_rtx.so.1; the ONNX parser opens it by the name without .1
    (folder / "libtensorrt_rtx.so").symlink_to(libs / "libtensorrt_rtx.so.1")
    env = os.environ | {"LD_LIBRARY_PATH": f"{folder}:{libs}", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, str(HERE / script), *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("sm", ["8.9", "12.0"])
def test_both_nodes_build(mini, tmp_path, sm):
    found = build("rtx_build.py", tmp_path, str(mini.library), "JetAttention", sm)
    assert found["parsed"] and found["layers"] == ["PLUGIN_V3"] * 2 and found["plan"] > 0, found


def test_a_node_called_attention_is_taken_for_onnx_s_own(mini, tmp_path):
    found = build("rtx_build.py", tmp_path, str(mini.library), "Attention", "8.9")
    assert not found["parsed"]
    assert any("TensorRT only supports Attention nodes with one output" in text for text in found["errors"])


@pytest.mark.parametrize("sm", [89, 120])
def test_jet_tiny_builds_whole(headers, tmp_path, sm):
    """The exporter's graph and the library agree: one plugin a layer, two profiles, a plan with the weights inside."""
    bundle = tmp_path / "bundle"
    o = BuildOptions("jet-tiny", backend="onnx", device="cpu", max_seq_len=512, output=bundle)
    run_build(make_plan(o), ["jet-export", "build"], lambda line: None)
    config = Manifest.load(bundle).config
    library = build_library(model_cases(config), [sm], headers) / NAME
    found = build("rtx_model.py", tmp_path, str(library), str(bundle), f"{sm // 10}.{sm % 10}")
    assert found["parsed"], found["errors"]
    assert found["layers"]["PLUGIN_V3"] == config.num_hidden_layers
    assert found["plan"] > 10e6, found["errors"]
