"""`--backend onnx` with states written every few tokens and a graph that verifies drafts."""

from pathlib import Path

import onnx
import pytest
import torch
from helpers.eager_bundle import write_mini_config
from helpers.packed import Packed

from jet_export.backends.eager import load_eager
from jet_export.backends.load import check_bundle, load_engine
from jet_export.backends.onnx.engine import OnnxEngine
from jet_export.backends.onnx.evaluate import jet_block
from jet_export.build.build import run_build
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import Manifest
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import EXTRA
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.verify.onnx import FORCED, forced_stage
from jet_export.verify.verify import verify_engines

L, DRAFTS = 3, 2


@pytest.mark.parametrize(
    ("form", "lens"), [(Form.DECODE, [1, 1, 1]), (Form.MIXED, [4, 2, 1]), (Form.VERIFY, [3, 1, 2])]
)
def test_the_node_equals_the_mutating_op(form: Form, lens: list[int]) -> None:
    """States in and states out, those of the step buffer too; its inputs stay."""
    p = Packed(lens, rows=[2, -1, 0], context=[7, 0, 9])
    *args, H, K, V, eps, _ = p.block_args(form)
    conv = args[6]
    args[6] = torch.cat([conv, torch.randn(conv.shape[0], DRAFTS + 1, conv.shape[2])], 1)
    slots = args[7].shape[0]
    beside = [torch.randn(slots, H, L + DRAFTS, K + V + EXTRA), torch.full((slots, H), 6, dtype=torch.int32)]
    inputs = [*args, *beside]
    before = [x.clone() for x in inputs]
    attributes = {"num_heads": H, "head_k_dim": K, "head_v_dim": V, "norm_eps": eps, "form": form, "interval": L}
    o, *states = jet_block(attributes, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert torch.equal(o, torch.ops.jet.jet_block(*args, H, K, V, eps, form, *beside, L, None))
    after = [args[6], args[7], *beside]
    assert len(states) == 4 and all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    assert not torch.equal(beside[0], before[-2])


def options(directory: Path, **changes) -> BuildOptions:
    values = {"backend": "onnx", "state_interval": L, "speculate": DRAFTS, **changes}
    return BuildOptions(
        model=str(write_mini_config(directory, layer_types=["jet", "swa"], num_hidden_layers=2)),
        device="cpu",
        random_weights=True,
        dtype="float32",
        max_batch_size=4,
        max_seq_len=64,
        prefill_chunk=24,
        output=directory / "bundle",
        **values,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("onnx")
    return run_build(make_plan(options(directory)), ["jet-export", "build"], lambda line: None)


def test_the_bundle_has_two_graphs_over_the_same_weights(bundle) -> None:
    m = Manifest.load(bundle)
    check_bundle(bundle, m)
    assert (m.state_interval, m.rollback) == (L, DRAFTS + 1)
    assert sorted(m.files) == ["model.onnx", "verify.onnx", "weights.safetensors"]
    forms = {}
    for name in ("model.onnx", "verify.onnx"):
        onnx.checker.check_model(str(bundle / name), full_check=True)
        graph = onnx.load(bundle / name, load_external_data=False).graph
        nodes = [n for n in graph.node if n.op_type == "JetBlock"]
        found = [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in nodes]
        assert nodes and all(len(n.input) == 13 and len(n.output) == 5 for n in nodes)
        assert {a["interval"] for a in found} == {L}
        (forms[name],) = {a["form"] for a in found}
        outputs = [v.name for v in graph.output]
        assert "layers.0.step_buffer_out" in outputs and "layers.0.state_position_out" in outputs
    assert forms == {"model.onnx": Form.MIXED, "verify.onnx": Form.VERIFY}


def test_it_passes_verification_drafts_included_and_finds_a_fault_at_its_node(bundle) -> None:
    engine, manifest = load_engine(bundle)
    assert isinstance(engine, OnnxEngine) and engine.verify_graph is not None
    eager = load_eager(bundle, manifest, engine.weights)
    stages = list(verify_engines(engine, eager))
    assert not [f for s in stages for f in s.failures] and "verify drafts" in [s.name for s in stages]
    forced = forced_stage(engine, eager, 0)
    assert not forced.failures and forced.name == FORCED
    name = "layers.1.mlp.down_proj.weight"
    engine.verify_graph.constants[name] = engine.verify_graph.constants[name] * 1.01
    assert {f.split(": ")[1] for f in forced_stage(engine, eager, 0).failures} == {"verify"}


def test_it_speculates_and_answers_as_without(bundle) -> None:
    engine, _ = load_engine(bundle)
    answers, steps = [], []
    for mode in ("off", "lookup"):
        serving = Serving(prefix_cache_bytes=0, speculate=mode)
        made = BatchingEngine(engine, ByteTokenizer(), -1, serving)
        if made.speculation:
            made.speculation.lengths.fixed = True
        prompts = [[7, 8, 9] * 6, list(range(20))]
        running = [made.submit(p, Params(14, ignore_eos=True), lambda _: None) for p in prompts]
        while made.step():
            pass
        answers.append([s.tokens for s in running])
        steps.append(sum(made.metrics.drafts.drafted) if made.metrics.drafts else 0)
    assert answers[0] == answers[1] and steps[1] > 0
