"""`--backend onnx` through the build's own flow: the bundle, its engine, verify, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from helpers.eager_bundle import write_mini_config

from jet_export.backends.eager import load_eager
from jet_export.backends.load import check_bundle, load_engine
from jet_export.backends.onnx.engine import OnnxEngine
from jet_export.build import backend_choice as backends
from jet_export.build.backend_choice import choose_backend
from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import Manifest
from jet_export.runtime.llm import LLM
from jet_export.utils.errors import JetExportError
from jet_export.verify.onnx import FORCED, forced_stage
from jet_export.verify.verify import STAGES, verify_bundle, verify_engines


def make(o: BuildOptions) -> list[str]:
    lines: list[str] = []
    run_build(make_plan(o), ["jet-export", "build"], lines.append)
    return lines


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> BuildOptions:
    directory = tmp_path_factory.mktemp("onnx")
    return BuildOptions(
        model=str(write_mini_config(directory)),
        backend="onnx",
        device="cpu",
        random_weights=True,
        max_batch_size=4,
        max_seq_len=48,
        prefill_chunk=24,
        output=directory / "bundle",
    )


@pytest.fixture(scope="module")
def bundle(options) -> Path:
    make(options)
    assert options.output is not None
    return options.output


def test_bundle(bundle, options) -> None:
    m = Manifest.load(bundle)
    check_bundle(bundle, m)
    assert m.backend["name"] == "onnx" and m.backend["onnx"] == onnx.__version__ and "isa" not in m.target
    assert sorted(m.files) == ["model.onnx", "weights.safetensors"]
    onnx.checker.check_model(str(bundle / "model.onnx"), full_check=True)
    assert make(options) == [f"{bundle} is up to date."]


def test_engine_passes_verify(bundle) -> None:
    engine, manifest = load_engine(bundle)
    assert isinstance(engine, OnnxEngine)
    stages = list(verify_engines(engine, load_eager(bundle, manifest, engine.weights)))
    assert not [f for s in stages for f in s.failures] and [s.name for s in stages] == [*STAGES]


def test_command_line_verify(bundle) -> None:
    """Includes the stage that only ONNX bundles have, which finds a fault at its node."""
    result = verify_bundle(bundle, None, 0, lambda line: None)
    assert result.passed and result.stages[-1].name == FORCED and result.stages[-1].tokens == 15
    engine, manifest = load_engine(bundle)
    assert isinstance(engine, OnnxEngine)
    eager = load_eager(bundle, manifest)
    name = "layers.1.mlp.down_proj.weight"
    engine.graph.constants[name] = engine.graph.constants[name] * 1.01
    failures = forced_stage(engine, eager, 0).failures
    assert [f.split(": ")[1:3] for f in failures] == [[s, "layers.1.mlp.down_proj"] for s in ("prefill", "decode")]


def test_verify_notices_a_swapped_state(bundle, monkeypatch) -> None:
    engine, manifest = load_engine(bundle)
    assert isinstance(engine, OnnxEngine)
    first, other = (s.name for s in engine.specs if s.name.endswith("conv_state"))
    run = engine.graph.run

    def swapped(feeds):
        out = run(feeds)
        return {**out, f"{first}_out": out[f"{other}_out"], f"{other}_out": out[f"{first}_out"]}

    monkeypatch.setattr(engine.graph, "run", swapped)
    stages = verify_engines(engine, load_eager(bundle, manifest, engine.weights))
    assert any("conv_state" in f for f in next(s for s in stages if s.failures).failures)


def test_generates_as_the_model_does(bundle) -> None:
    llm = LLM(bundle)
    prompts = [[5, 7, 11, 2], list(range(30))]
    ours = llm.generate(prompts, max_new_tokens=6, ignore_eos=True)
    llm.engine = load_eager(bundle, llm.manifest)
    llm.runner.engine = llm.engine
    theirs = llm.generate(prompts, max_new_tokens=6, ignore_eos=True)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]


def test_auto_never_chooses_it(monkeypatch) -> None:
    assert "onnx" not in backends.SEEN_RUNNING
    monkeypatch.setattr(backends, "SEEN_RUNNING", {})
    assert choose_backend("auto", "x86_64").name == "inductor"
    assert choose_backend("onnx", "x86_64").name == "onnx"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_onnx_nothing_is_written(options, tmp_path, monkeypatch, missing) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(JetExportError, match=rf"--backend onnx needs {missing}.\npip install 'jet-export\[onnx\]'"):
        make(replace(options, output=tmp_path / "x"))
    assert not list(tmp_path.iterdir())
