"""TensorRT for RTX on the CPU: parses and builds whole models for SM 8.9 and 12.0; the layer reports are checked."""

import json
from collections import Counter

import onnx
import pytest
from helpers.rtx_bundles import needs_rtx, rtx_bundle
from onnx import TensorProto, helper

from jet_export.backends.tensorrt.builder import BuildSpec
from jet_export.backends.tensorrt.flavors import FLAVORS
from jet_export.backends.tensorrt.layers import REPORT, VERIFY_REPORT, LayerReport, check, expected, rows
from jet_export.backends.tensorrt.profiles import VERIFY_NAMES, profiles
from jet_export.build.tensorrt import build_plan
from jet_export.bundle.manifest import Manifest
from jet_export.plugins.library import NAME
from jet_export.utils.errors import JetExportError

pytestmark = needs_rtx
RTX = FLAVORS["tensorrt-rtx"]
LAYERS = {  # jet, window, attention
    "jet-tiny bf16": "jjwjajj",
    "jet-tiny fp8, 3 layers": "jwa",
    "jet-4b fp8, 2 layers": "ja",
}


def fp8_of(bundle) -> list[str]:
    return Manifest.load(bundle).fp8_layers


def plan_of(bundle, directory, sm: int, graph=None) -> LayerReport:
    m, graph = Manifest.load(bundle), graph or bundle / "model.onnx"
    shapes = profiles(graph, m.config, m.limits)
    library = str(bundle / NAME)
    spec = BuildSpec(backend=RTX.backend, graph=str(graph), library=library, sms=[sm], profiles=shapes)
    return build_plan(spec, directory)


def assert_layers(report: LayerReport, bundle, kinds: str) -> None:
    """Check for the model's layers in both profiles, and apart from them elementwise kernels only, no copies."""
    table = {(r.what, r.name): r for r in rows(report)}
    jets, others, fp8 = kinds.count("j"), len(kinds) - kinds.count("j"), fp8_of(bundle)
    big = "fp8 x fp8 -> bf16" if fp8 else "bf16 x bf16 -> bf16"
    wanted = {
        "self_attn.in_proj": jets,
        "self_attn.w2": jets,
        "self_attn.qkv_proj": others,
        **dict.fromkeys(("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"), len(kinds)),
    }
    for name, count in wanted.items():
        assert table["GEMM", name].counts == (count, count) and table["GEMM", name].precision == big
    for name, count in {"self_attn.ba_proj": jets, "lm_head": 1}.items():
        assert table["GEMM", name].counts == (count, count) and table["GEMM", name].precision == "bf16 x bf16 -> bf16"
    for name, count in {"self_attn.JetBlock": jets, "self_attn.JetAttention": others}.items():
        assert table["plugin", name].counts == (count, count)
    assert table["copies", ""].counts == (0, 0)
    kinds_found = Counter(x.kind for x in report.layers)
    assert kinds_found["plugin"] == 2 * len(kinds) and kinds_found["gemm"] == 2 * (sum(wanted.values()) + jets + 1)


@pytest.mark.parametrize("name", LAYERS)
def test_whole_models_build(name, tmp_path_factory, tmp_path) -> None:
    """For the bundle's SMs (jet-tiny: both at once), and for each SM alone; jet-4b's bundle is FP8 for SM 8.9 alone."""
    bundle = rtx_bundle(tmp_path_factory, name)
    m = Manifest.load(bundle)
    sms = [89] if "4b" in name else [89, 120]
    assert m.target == {"device": "cuda", "arch": "+".join(f"sm_{sm}" for sm in sms), "sms": sms}
    assert m.build["verified"]["passed"] is None and "built without a GPU of SM 8.9" in m.build["verified"]["why"]
    assert m.backend["tensorrt-rtx"] == RTX.version()
    assert {"engine.plan", NAME, REPORT, "model.onnx", "weights.safetensors"} <= m.files.keys()
    assert m.files["engine.plan"]["bytes"] > m.files["weights.safetensors"]["bytes"]  # the weights are in the plan
    assert m.backend["library_in_plan"] and (bundle / NAME).read_bytes() in (bundle / "engine.plan").read_bytes()
    assert_layers(LayerReport.load(bundle / REPORT), bundle, LAYERS[name])
    assert ("verify.plan" in m.files) == (m.rollback > 0) == ((bundle / VERIFY_REPORT).is_file())
    if m.rollback:  # "jet-tiny fp8": a buffer beside each state, and an engine that verifies drafts
        report = LayerReport.load(bundle / VERIFY_REPORT)
        assert check(report, expected(bundle / "verify.onnx", fp8_of(bundle)), VERIFY_NAMES) == []
        jets = [r for r in rows(report, VERIFY_NAMES) if r.name == "self_attn.JetBlock"]
        assert [r.counts for r in jets] == [(LAYERS[name].count("j"),)]
        assert {"layers.0.step_buffer", "layers.0.state_position_out"} <= {b["name"] for b in report.bindings}
    for sm in (120,) if "fp8" in name else (89, 120):
        assert_layers(plan_of(bundle, tmp_path, sm), bundle, LAYERS[name])


def edit(bundle, tmp_path, change) -> LayerReport:
    """The report of a graph after `change`, a function of the node list and the graph."""
    (tmp_path / "weights.safetensors").symlink_to(bundle / "weights.safetensors")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    return plan_of(bundle, tmp_path, 89, tmp_path / "model.onnx")


def insert(graph, before, nodes) -> None:
    at = list(graph.node).index(before)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*rest[:at], *nodes, *rest[at:]])


def copied_input(graph) -> None:
    """The columns of a packed projection in another order, as if separate projections were joined."""
    node = next(n for n in graph.node if n.op_type == "JetBlock")
    graph.initializer.append(helper.make_tensor("sizes", TensorProto.INT64, [2], [16, 1040]))
    new = [
        helper.make_node("Split", [node.input[0], "sizes"], ["a", "b"], name="split", axis=1),
        helper.make_node("Concat", ["b", "a"], ["c"], name="concat", axis=1),
    ]
    node.input[0] = "c"
    insert(graph, node, new)


def transposed_input(graph) -> None:
    node = next(n for n in graph.node if n.op_type == "JetBlock")
    graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [2], [8, -1]))
    new = [
        helper.make_node("Reshape", [node.input[1], "shape"], ["a"], name="reshape"),
        helper.make_node("Transpose", ["a"], ["b"], name="transpose", perm=[1, 0]),
    ]
    node.input[1] = "b"
    insert(graph, node, new)


def state_not_bound(graph) -> None:
    """A state that goes through a kernel before its plugin."""
    node = next(n for n in graph.node if n.op_type == "JetBlock")
    graph.initializer.append(helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]))
    double = helper.make_node("Mul", [node.input[7], "two"], ["a"], name="double")
    node.input[7] = "a"
    insert(graph, node, [double])


def unquantised(graph) -> None:
    """A projection's input that does not pass through Q and DQ."""
    gemm = next(n for n in graph.node if n.name == "layers.0.mlp.down_proj")
    made = {o: n for n in graph.node for o in n.output}
    cast = made[gemm.input[0]]
    quantize = made[made[cast.input[0]].input[0]]
    assert (cast.op_type, quantize.op_type) == ("Cast", "QuantizeLinear")
    cast.input[0] = quantize.input[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (copied_input, "prefill: layers.0.self_attn.JetBlock: a copy (__myl_SlicSlicConc) produces its input"),
        (transposed_input, "prefill: layers.0.self_attn.JetBlock: a copy (__myl_Tran) produces its input"),
        (state_not_bound, "layers.0.recurrent_state is not bound to the plugin itself"),
        (unquantised, "prefill: layers.0.mlp.down_proj must be an FP8 GEMM, and is bf16 x "),
    ],
)
def test_the_check_finds(change, message, tmp_path_factory, tmp_path) -> None:
    bundle = rtx_bundle(tmp_path_factory, "jet-tiny fp8, 3 layers")
    problems = check(edit(bundle, tmp_path, change), expected(bundle / "model.onnx", fp8_of(bundle)))
    assert any(message in p for p in problems), problems


def test_the_check_requires_every_layer_once(tmp_path_factory) -> None:
    bundle = rtx_bundle(tmp_path_factory, "jet-tiny fp8, 3 layers")
    report, want = LayerReport.load(bundle / REPORT), expected(bundle / "model.onnx", fp8_of(bundle))
    assert check(report, want) == []
    plugins = [x for x in report.layers if x.kind == "plugin"]
    assert check(LayerReport([x for x in report.layers if x is not plugins[0]]), want) == [
        f"prefill: {plugins[0].name} is 0 plugin layers, not one"
    ]
    twice = check(LayerReport([*report.layers, plugins[-1]]), want)
    assert f"decode: {plugins[-1].name} is 2 plugin layers, not one" in twice
    assert "decode: 1 plugin layers more than the graph has jet nodes" in twice
    assert check(LayerReport([]), want) == ["TensorRT logged no layers, so the engine cannot be checked"]
    table = {**next(b for b in report.bindings if b["name"] == "slots"), "host": True}
    assert check(LayerReport(report.layers, [table]), want) == ["slots is bound on the host, where no call binds it"]
    fewer = expected(bundle / "model.onnx", fp8_of(bundle)[1:])
    assert [p.split(", and is")[0] for p in check(report, fewer)] == [
        f"{mode}: {fp8_of(bundle)[0].removeprefix('model.')} must not be an FP8 GEMM" for mode in ("prefill", "decode")
    ]


def test_tensorrts_errors_are_repeated(tmp_path_factory, tmp_path) -> None:
    bundle = rtx_bundle(tmp_path_factory, "jet-tiny bf16")

    def wrong_field(graph) -> None:
        node = next(n for n in graph.node if n.op_type == "JetBlock")
        next(a for a in node.attribute if a.name == "head_k_dim").i = 48

    with pytest.raises(
        JetExportError, match=r"RTX 1.* built no engine:\n(.*\n)*.*JetBlock: this library holds no kernels for the node"
    ):
        edit(bundle, tmp_path, wrong_field)
    with pytest.raises(JetExportError, match=r"built no engine:\n  it has no engines for SM 9\.0"):
        plan_of(bundle, tmp_path, 90)


def test_without_the_link_to_its_library_the_parser_aborts(tmp_path_factory, tmp_path, monkeypatch):
    """Why the builder has a process and an environment of its own; the message says how it died."""
    from contextlib import nullcontext

    bundle = rtx_bundle(tmp_path_factory, "jet-tiny bf16")
    monkeypatch.setattr(type(RTX), "parser_environment", lambda self: nullcontext({}))
    with pytest.raises(JetExportError, match="TensorRT for RTX: the process that builds ended with"):
        plan_of(bundle, tmp_path, 89)
    assert not (tmp_path / "engine.plan").exists() and not list(tmp_path.glob(".trt-*"))


def test_a_node_called_attention_is_taken_for_onnx_s_own(tmp_path_factory, tmp_path) -> None:
    bundle = rtx_bundle(tmp_path_factory, "jet-tiny bf16")

    def renamed(graph) -> None:
        next(n for n in graph.node if n.op_type == "JetAttention").op_type = "Attention"

    with pytest.raises(JetExportError, match="TensorRT only supports Attention nodes with one output"):
        edit(bundle, tmp_path, renamed)


def test_manifest_is_json(tmp_path_factory) -> None:
    values = json.loads((rtx_bundle(tmp_path_factory, "jet-tiny bf16") / REPORT).read_text())
    assert {"layers", "bindings"} == values.keys()
