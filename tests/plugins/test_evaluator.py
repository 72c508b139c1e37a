"""The evaluator with the plugin library in place of the torch ops: on a GPU as it is, on a CPU over replay.py."""

from pathlib import Path

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.onnx_models import export
from helpers.replay import run_job

from jet_export.kernels import common
from jet_export.ladder.runs import SMALL_RUNS
from jet_export.model.cache import state_specs
from jet_export.model.jet_nemotron import random_model
from jet_export.plugins.cases import case_to_dict, model_cases
from jet_export.plugins.library import library_for

SM = 90


@pytest.fixture(scope="module")
def library(headers) -> Path:
    """Of the small model of `mini_config`, in fp32, which Triton's interpreter computes rightly."""
    return library_for(mini_config(), [SM], dtype="float32", cache_dtype="float32", headers=headers)


@pytest.mark.skipif(
    not common.INTERPRET, reason="the CPU's stand-in for a GPU; with one, the test below is the real thing"
)
def test_the_plugins_own_launches_compute_the_graph(headers, tools, library, tmp_path):
    """Plugin objects created from the graph's attributes, enqueued on the evaluator's tensors, their launches run by
    Triton's interpreter: every value is the model's own, prefill and decode, and a decode step end to end."""
    config = mini_config()
    model = random_model(config, torch.float32, "cpu", 0, 256)
    job = {
        "config": str(tmp_path / "mini.json"),
        "folder": str(library),
        "headers": str(headers),
        "sm": SM,
        "fake": str(tools[1]),
        "graph": str(export(model, tmp_path / "graph")),
    }
    config.save(tmp_path / "mini.json")
    found = run_job(job, tmp_path)
    prefill, decode = found["nodes"]
    states = {s.name + "_out" for s in state_specs(config, torch.float32)}
    assert states | {"logits", "layers.0.self_attn.o_proj.input"} <= prefill.keys() == decode.keys(), prefill.keys()
    assert max(max(step.values()) for step in (prefill, decode)) < 1e-5
    assert found["end_to_end"] < 1e-5
    assert found["launches"] > 20


@pytest.mark.skipif(not common.INTERPRET, reason="the CPU's stand-in for a GPU; test_on_gpu.py is the real thing")
def test_plugins_compute_what_their_references_do(headers, tools, library, tmp_path):
    """Prefill, chunks and decode, with a window, states in place and apart: then rows outside `slots` survive and no
    input changes. With meaningless batch tensors every load and store stays in the inputs, outputs and workspace."""
    cases = model_cases(mini_config(), dtype="float32")
    job = {
        "folder": str(library),
        "headers": str(headers),
        "sm": SM,
        "fake": str(tools[1]),
        "runs": SMALL_RUNS,
        "kinds": ["any", "near"],
        "cases": [case_to_dict(case) for case in cases],
    }
    found = run_job(job, tmp_path)
    assert len(found["errors"]) == found["hostile"] == 2 * len(cases) * len(SMALL_RUNS)
    assert max(found["errors"].values()) < 1e-5, found["errors"]
    assert not found["lost"]
