"""Seeded faults: which rung of the ladder catches each. docs/backends/tensorrt-faults.md is this file in words.

Rungs that need a GPU are seeded where the CPU has a stand-in: plugin outputs on replay.py, engines on
tests/helpers/faults.py; faults of the TensorRT runtime are in tests/backends/tensorrt/test_runtime.py.
"""

import re
from typing import Any

import pytest
from helpers.eager_bundle import mini_config
from helpers.faults import FaultyEngine
from helpers.fp8_models import CALIBRATION, model_of, to_fp8
from helpers.onnx_models import engines
from helpers.paths import DOCS
from helpers.replay import run_job

from jet_export.bundle.limits import Limits
from jet_export.kernels import common
from jet_export.ladder import rungs
from jet_export.ladder.site import Site
from jet_export.model.fp8 import Fp8Linear
from jet_export.plugins.cases import case_to_dict, model_cases
from jet_export.plugins.harness.build import harness_library
from jet_export.plugins.harness.objects import Harness
from jet_export.plugins.library import NAME, library_for
from jet_export.verify.onnx import forced_stage
from jet_export.verify.verify import verify_engines

DOC = DOCS / "backends/tensorrt-faults.md"
LAUNCHED = ["transposed stride", "wrong FP8 scale", "stale context_lens", "missing reformat", "swapped state binding"]
UNSEEN = {("wrong FP8 scale", "JetBlock")}  # it has none


@pytest.mark.skipif(not common.INTERPRET, reason="the CPU's stand-in for the rung on a GPU")
def test_plugin_outputs_catch(headers, tools, tmp_path):
    library = library_for(mini_config(), [90], dtype="float32", cache_dtype="float32", headers=headers)
    cases = model_cases(mini_config(), dtype="float32")
    job = {
        "folder": str(library),
        "headers": str(headers),
        "sm": 90,
        "fake": str(tools[1]),
        "faults": LAUNCHED,
        "cases": [case_to_dict(case) for case in cases],
    }
    found = run_job(job, tmp_path)["faults"]
    assert max(found.pop("").values()) < 1e-5
    for fault, errors in found.items():
        for node, error in errors.items():
            assert (error > 1e-3) != ((fault, node) in UNSEEN), (fault, node, error)


def test_plugin_objects_catch_a_missing_reformat(headers, tmp_path, monkeypatch):
    """A plugin that takes any layout gets what it cannot read: TensorRT puts no reformat before it."""
    cases = model_cases(mini_config(), dtype="float32")
    library = library_for(mini_config(), [90], dtype="float32", cache_dtype="float32", headers=headers)
    site = Site(bundle=tmp_path, work=tmp_path, headers=headers)
    site.__dict__["cases"] = cases
    harness = Harness(harness_library(headers), library / NAME)
    monkeypatch.setattr(rungs, "harness_of", lambda site: (harness, library))
    assert not rungs.plugin_objects(site).failures
    real = Harness.supports
    monkeypatch.setattr(Harness, "supports", lambda self, *args, layout=0: real(self, *args))
    failures = rungs.plugin_objects(site).failures
    assert len(failures) == len(cases) and all("not laid out linearly" in line for line in failures)


@pytest.fixture(scope="module")
def fp8_engines(tmp_path_factory):
    model = model_of()
    to_fp8(model, CALIBRATION[0])
    return engines(model, tmp_path_factory.mktemp("fp8"), Limits(max_batch_size=4, max_seq_len=192, prefill_chunk=96))


def test_the_onnx_rung_catches_a_wrong_fp8_scale(fp8_engines):
    onnx, eager = fp8_engines
    assert not forced_stage(onnx, eager, 0).failures
    name = next(n for n in onnx.graph.constants if re.fullmatch(r"layers\.1\.mlp\.down_proj\..*scale.*", n))
    held = onnx.graph.constants[name]
    onnx.graph.constants[name] = held * 1.05
    try:
        failures = forced_stage(onnx, eager, 0).failures
    finally:
        onnx.graph.constants[name] = held
    assert failures and all("layers.1.mlp.down_proj" in line for line in failures)


def test_the_onnx_rung_catches_a_swapped_state(fp8_engines):
    onnx, eager = fp8_engines
    swap = {f"layers.{a}.recurrent_state": f"layers.{b}.recurrent_state" for a, b in ((0, 3), (3, 0))}
    nodes = onnx.graph.nodes
    onnx.graph.nodes = [n._replace(inputs=tuple(swap.get(i, i) for i in n.inputs)) for n in nodes]
    try:
        failures = forced_stage(onnx, eager, 0).failures
    finally:
        onnx.graph.nodes = nodes
    assert any("layers.0.recurrent_state_out" in line for line in failures)


class WrongScale(FaultyEngine):
    """One projection's input scale 5 % too large, as an engine may have folded it."""

    def __init__(self, eager) -> None:
        super().__init__(eager)
        path = next(p for p, m in self.model.named_modules() if isinstance(m, Fp8Linear) and "down_proj" in p)
        linear: Any = self.model.get_submodule(path)
        linear.input_scale = linear.input_scale * 1.05


def test_the_engine_rung_and_a_wrong_fp8_scale(fp8_engines):
    """5 % of one scale hides below FP8's own rounding end to end; the ONNX rung and the layer report see the graph that
    the engine was built from. Four times the scale does not hide."""
    _, eager = fp8_engines
    small = WrongScale(eager)
    large = WrongScale(eager)
    for module in large.model.modules():
        if isinstance(module, Fp8Linear):
            module.weight_scale = module.weight_scale * 4
    first = {
        name: next((s for s in verify_engines(e, eager) if s.failures), None)
        for name, e in (("small", small), ("large", large))
    }
    assert first["large"] is not None
    assert first["small"] is None


def test_a_scale_that_model_and_engine_share_is_seen_by_no_rung(tmp_path):
    """Both read the same weights file: only the held-out text, engine beside unquantised, tells."""
    model = model_of()
    to_fp8(model, CALIBRATION[0])
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            module.input_scale = module.input_scale * 8
    onnx, eager = engines(model, tmp_path, Limits(max_batch_size=4, max_seq_len=192, prefill_chunk=96))
    assert not forced_stage(onnx, eager, 0).failures


def test_the_doc_names_every_fault():
    text = DOC.read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert set(LAUNCHED) | {"wrong profile"} <= set(rows)
