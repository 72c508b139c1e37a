"""The evaluator with the plugin library in place of the torch ops: on a GPU as it is, on a CPU over replay.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.onnx_models import GRAPH_LIMITS, export
from helpers.plugin_nodes import BUFFER, BUFFERED_CONFIGS
from helpers.replay import run_job
from helpers.rtx_bundles import needs_rtx

from jet_export.backends.tensorrt.builder import BuildSpec
from jet_export.backends.tensorrt.layers import Expected, check, expected
from jet_export.backends.tensorrt.profiles import profiles
from jet_export.build.tensorrt import ENGINES, build_plan
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
    config = mini_config(layer_types=["jet", "attn", "swa"], num_hidden_layers=3)
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


@pytest.fixture(scope="module")
def qwen_graph(tmp_path_factory) -> Path:
    """A small Qwen3.5's model.onnx, with verify.onnx beside it, in fp32."""
    model = random_model(BUFFERED_CONFIGS["qwen3_5"], torch.float32, "cpu", 0, 256)
    return export(model, tmp_path_factory.mktemp("qwen3_5"), **BUFFER)


@pytest.mark.skipif(not common.INTERPRET, reason="the CPU's stand-in for a GPU; test_on_gpu.py is the real thing")
def test_graphs_with_step_buffers_and_drafts(headers, buffered, qwen_graph, tmp_path):
    """model.onnx and verify.onnx with the plugins' own launches, every value forced."""
    config = BUFFERED_CONFIGS["qwen3_5"]
    config.save(tmp_path / "config.json")
    job = {"config": str(tmp_path / "config.json"), "graph": str(qwen_graph), **BUFFER}
    found = run_job(job_of(buffered, headers) | job, tmp_path)
    assert len(found["nodes"]) == 3  # prefill, decode, verify
    states = {s.name + "_out" for s in state_specs(config, torch.float32, **BUFFER)}
    assert all(states <= step.keys() for step in found["nodes"])
    assert max(max(step.values()) for step in found["nodes"]) < 1e-5 and found["end_to_end"] < 1e-5


@needs_rtx
@pytest.mark.parametrize("name", ENGINES)
def test_tensorrt_builds_them(name, buffered, qwen_graph, tmp_path):
    """For SM 8.9, with one plugin a layer and no copies; nothing runs, so that cubins of another SM do."""
    graph, (file, _, modes) = qwen_graph.with_name(name), ENGINES[name]
    shapes = profiles(graph, BUFFERED_CONFIGS["qwen3_5"], GRAPH_LIMITS, modes, BUFFER["rollback"])
    library = str(buffered.library)
    spec = BuildSpec(backend="tensorrt-rtx", graph=str(graph), library=library, sms=[89], profiles=shapes)
    report, want = build_plan(spec, tmp_path, file), expected(graph, [])
    assert check(report, want, modes) == [] and (tmp_path / file).is_file()
    assert sorted(want.plugins) == ["layers.0.self_attn.JetBlock", "layers.1.self_attn.JetAttention"]
    assert check(report, Expected({}, want.products), modes) != []


def job_of(built: Any, headers: Path) -> dict[str, Any]:
    return {"folder": str(built.folder), "headers": str(headers), "sm": SM, "fake": str(built.fake)}


@pytest.mark.skipif(not common.INTERPRET, reason="the CPU's stand-in for a GPU; test_on_gpu.py is the real thing")
def test_buffered_plugins_compute_what_their_references_do(headers, buffered, tmp_path):
    """As below: a mixed call, and one that verifies drafts. Faults of the latter are seen, those of positions too."""
    cases = [case_to_dict(case) for case in buffered.cases]
    job = {
        "runs": {"mixed": ([1, 1, 3], [9, 1, 30])},
        "kinds": ["near"],
        "faults": ["stale context_lens", "swapped state binding"],
        "faulty cases": cases[:1],
        "cases": cases,
    }
    found = run_job(job_of(buffered, headers) | job, tmp_path)
    assert len(found["errors"]) == 2 * found["hostile"] == 4 * len(buffered.cases)
    assert max(found["errors"].values()) < 1e-5, found["errors"]
    assert not found["lost"]
    assert max(found["faults"].pop("").values()) < 1e-5
    assert min(error for errors in found["faults"].values() for error in errors.values()) > 1e-3, found["faults"]


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
