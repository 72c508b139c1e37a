"""The ONNX file: its contents, and that its graph computes what the model does in prefill, chunks and decode."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.compare import relative_error, same_bits
from helpers.fp8_models import CALIBRATION, model_of, to_fp8
from helpers.golden import DATA, MINI_NAMES, load_golden
from helpers.onnx_models import GRAPH_LIMITS, engines, export
from helpers.packed import Packed
from helpers.paged import make_case
from helpers.short_tiny import short_tiny

from jet_export.backends.eager import EagerEngine
from jet_export.backends.onnx.engine import OnnxEngine
from jet_export.backends.onnx.evaluate import HANDLERS, OnnxModel, attention, jet_block
from jet_export.backends.onnx.export import write_onnx
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import WEIGHTS
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.model.cache import state_specs
from jet_export.model.fp8 import FP8, Fp8Linear
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.runner import Runner
from jet_export.utils.errors import JetExportError
from jet_export.verify.onnx import forced_bound, forced_steps, teacher_forced
from jet_export.verify.parity import kl_divergence
from jet_export.verify.trial import Layout, Trial, decode_step, prefill_step, random_prompts

LIMITS = Limits(max_batch_size=4, max_seq_len=256, prefill_chunk=128)


@pytest.fixture(scope="module")
def fp8_model() -> JetNemotronForCausalLM:
    model = model_of()
    to_fp8(model, CALIBRATION[0])
    return model


@pytest.fixture(scope="module")
def fp8_file(fp8_model, tmp_path_factory) -> Path:
    return export(fp8_model, tmp_path_factory.mktemp("fp8"), FP8)


# The nodes: states in and states out


@pytest.mark.parametrize("lens", [[1, 1, 1], [5, 70, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jet_block_equals_the_mutating_op(lens, dtype) -> None:
    p = Packed(lens, dtype=dtype, rows=[2, -1, 0])
    *args, H, K, V, eps, form = p.block_args(Form.DECODE if len(lens) == sum(lens) else Form.MIXED)
    before = [a.clone() for a in args]
    attributes = {"num_heads": H, "head_k_dim": K, "head_v_dim": V, "norm_eps": eps, "form": form}
    o, conv_state, recurrent_state = jet_block(attributes, *args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    expected = torch.ops.jet.jet_block(*args, H, K, V, eps, form, *NO_BUFFER, None)
    assert torch.equal(o, expected)
    assert torch.equal(conv_state, args[6]) and torch.equal(recurrent_state, args[7])
    assert not torch.equal(conv_state, before[6])


@pytest.mark.parametrize(("lens", "context"), [([1, 1, 1], [40, 0, 17]), ([5, 40, 1], [40, 0, 17])])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_attention_equals_the_mutating_op(lens, context, cache_dtype) -> None:
    c = make_case(lens, context, dtype=torch.bfloat16, cache_dtype=cache_dtype, window=24, k_scale=0.25, v_scale=0.5)
    *args, form = c.op_args()
    names = ("num_heads", "num_kv_heads", "head_dim", "window", "k_scale", "v_scale")
    o, cache = attention({**{n: getattr(c, n) for n in names}, "form": form}, *args[:7])
    assert same_bits(args[2], c.kv_cache)
    assert torch.equal(o, torch.ops.jet.attention(*args, form))
    assert same_bits(cache, args[2]) and not same_bits(cache, c.kv_cache)


# The file


def test_file(fp8_model, fp8_file) -> None:
    """Names, shapes, opset; every weight once, by the state dict's name, its bytes those of the safetensors file."""
    model = onnx.load(fp8_file, load_external_data=False)
    graph = model.graph
    assert {o.domain: o.version for o in model.opset_import} == {"": 21, "jet": 2}
    specs = [s.name for s in state_specs(fp8_model.config, torch.bfloat16)]
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert list(dims)[:7] == [
        "input_ids",
        "cu_seqlens",
        "slots",
        "context_lens",
        "block_table",
        "window_block_table",
        "logit_indices",
    ]
    assert list(dims)[7:] == specs
    assert [v.name for v in graph.output] == ["logits", *(f"{n}_out" for n in specs)]
    assert dims["input_ids"] == ["tokens"] and dims["cu_seqlens"] == ["sequences + 1"]
    assert dims["layers.0.conv_state"] == ["slots", 3, 128] and dims["layers.1.kv_cache"][0] == "pages"

    ops = Counter(n.op_type for n in graph.node)
    assert (ops["JetBlock"], ops["JetAttention"]) == (2, 2)
    projections = sum(isinstance(m, Fp8Linear) for m in fp8_model.modules())
    assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (projections, 2 * projections)

    state = {**fp8_model.state_dict(), "cos_sin": fp8_model.cos_sin}
    del state["lm_head.weight"]
    external = {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert external.keys() == state.keys()
    assert all({e.key: e.value for e in t.external_data}["location"] == WEIGHTS for t in external.values())
    constants = OnnxModel.load(fp8_file).constants
    for name, t in state.items():
        assert torch.equal(constants[name].reshape(t.shape).view(torch.uint8), t.view(torch.uint8)), name
    codes = next(t for t in graph.initializer if t.name == "layers.0.mlp.down_proj.weight")
    assert codes.data_type == onnx.TensorProto.FLOAT8E4M3FN
    inline = [t for t in graph.initializer if t.name not in external]
    assert sum(len(t.SerializeToString()) for t in inline) < 2000
    assert not any(n.metadata_props or n.doc_string for n in graph.node)  # torch's hold this machine's paths


def test_the_file_does_not_depend_on_the_models_device(fp8_model, fp8_file, tmp_path) -> None:
    """The same bytes from another device, though torch.onnx creates the results of symbolic nodes on the CPU."""
    elsewhere = copy.deepcopy(fp8_model).to("meta")
    elsewhere.lm_head.weight = elsewhere.embed_tokens.weight
    assert elsewhere.device.type == "meta"
    (tmp_path / WEIGHTS).write_bytes((fp8_file.parent / WEIGHTS).read_bytes())
    dtypes = Dtypes(model=fp8_model.dtype, kv_cache=FP8)
    assert write_onnx(elsewhere, tmp_path, dtypes, GRAPH_LIMITS).read_bytes() == fp8_file.read_bytes()
    assert elsewhere.device.type == "meta"  # and the model is as it was


def test_untied_head(tmp_path) -> None:
    model = model_of(tie_word_embeddings=False)
    names = {t.name for t in onnx.load(export(model, tmp_path), load_external_data=False).graph.initializer}
    assert {"lm_head.weight", "embed_tokens.weight"} <= names


# FP8 off: end to end


@pytest.mark.parametrize("name", MINI_NAMES)
def test_goldens(name, tmp_path) -> None:
    """Chunked prefill and decode as published, and as the model within fp32's or bf16's rounding."""
    golden = load_golden(DATA / name)
    model = golden.model(tmp_path / "model")
    ids = golden.input_ids.tolist()
    limits = Limits(max_batch_size=len(ids), max_seq_len=len(ids[0]), prefill_chunk=max(golden.chunks))
    onnx_engine, eager = engines(model, tmp_path / "onnx", limits)
    rows, start, logits = list(range(len(ids))), 0, []
    runners = [Runner(e) for e in (onnx_engine, eager)]
    for n in golden.chunks:
        both = [r.prefill(rows, [x[start : start + n] for x in ids], all_logits=True) for r in runners]
        logits.append([x.unflatten(0, (len(ids), n)) for x in both])
        start += n
    published = [golden.outputs["logits.prefill"]]
    for t in range(start, len(ids[0])):
        tokens = torch.tensor([x[t] for x in ids])
        logits.append([r.decode(rows, tokens)[:, None] for r in runners])
        published.append(golden.outputs["logits.decode"][:, t - start : t - start + 1])
    ours, theirs = (torch.cat(x, 1) for x in zip(*logits, strict=True))
    u = 1e-5 if model.dtype == torch.float32 else 2**-8
    assert relative_error(ours, theirs) <= u
    for a, b, spec in zip(*(r.states for r in runners), eager.specs, strict=True):
        assert relative_error(a, b) <= u, spec.name
    assert relative_error(ours, torch.cat(published, 1)) <= (3e-3 if model.dtype == torch.float32 else 5e-2)


@pytest.fixture(scope="module")
def tiny() -> JetNemotronForCausalLM:
    """A trained layer of each kind."""
    return short_tiny(LIMITS.max_seq_len)


@pytest.fixture(scope="module")
def tiny_engines(tiny, tmp_path_factory) -> tuple[OnnxEngine, EagerEngine]:
    return engines(tiny, tmp_path_factory.mktemp("tiny"), LIMITS)


def trial_batch(model, call, held, eager):
    layout = Layout(model.config, tokens=200, longest_call=64, seed=0, device=torch.device("cpu"))
    trial = Trial(eager, layout, random_prompts(model.config, 200, 0))
    ids = torch.randint(model.config.vocab_size, (sum(call.lens),), generator=torch.Generator().manual_seed(1))
    return ids, layout.batch(call, held), trial.states


STEPS = [
    pytest.param(prefill_step(LIMITS), [7, 0, 40], id="prefill"),
    pytest.param(decode_step(), [7, 9, 40], id="decode"),
]


@pytest.mark.parametrize(("call", "held"), STEPS)
def test_tiny_ragged_steps(tiny, tiny_engines, call, held) -> None:
    """With padding rows and empty sequences; states within the bf16 rounding."""
    engine, eager = tiny_engines
    ids, batch, states = trial_batch(tiny, call, held, eager)
    rows = torch.arange(len(ids), dtype=torch.int32)
    ours, theirs = ([s.clone() for s in states] for _ in range(2))
    a = engine.prefill(ids, batch, rows, ours)
    b = eager.prefill(ids, batch, rows, theirs)
    assert relative_error(a, b) <= 2**-8
    for x, y, before, spec in zip(ours, theirs, states, eager.specs, strict=True):
        assert relative_error(x, y) <= 2**-8, spec.name
        assert not torch.equal(x, before)


# FP8 on


@pytest.mark.parametrize("step", [0, 1], ids=["prefill", "decode"])
def test_fp8_every_node_on_the_models_own_inputs(fp8_model, fp8_file, step) -> None:
    """Projections, norms, cores and sums are within their own roundings; without FP8 products mostly to the bit."""
    graph = OnnxModel.load(fp8_file)
    eager = EagerEngine(fp8_model, LIMITS, kv_dtype=FP8, state_dtype=torch.float32)
    inputs = list(forced_steps(eager, 0))[step]
    matches = teacher_forced(graph, eager, inputs)
    assert [m for m in matches if not m.relative <= forced_bound(eager, m.name)] == []
    exact = [m.name for m in matches if m.relative == 0]
    assert len(exact) > len(matches) // 2
    names = {m.name for m in matches}
    for path, module in fp8_model.named_modules():
        if isinstance(module, Fp8Linear):
            assert path in names
    assert {"logits", *(f"{s.name}_out" for s in eager.specs)} <= names

    name = "layers.2.mlp.down_proj.input_scale"  # a fault is found where it is, and nowhere else
    graph.constants[name] = graph.constants[name] * 1.5
    wrong = [m.name for m in teacher_forced(graph, eager, inputs) if not m.relative <= 3 * 2**-8]
    assert wrong == ["layers.2.mlp.down_proj"]


def test_fp8_end_to_end(fp8_model, fp8_file) -> None:
    """Codes may flip, so the distributions are compared."""
    eager = EagerEngine(fp8_model, LIMITS, kv_dtype=FP8, state_dtype=torch.float32)
    engine = OnnxEngine.like(eager, OnnxModel.load(fp8_file))
    runners = [Runner(e) for e in (engine, eager)]
    prompts = random_prompts(fp8_model.config, 80, 0)
    logits: list[list[torch.Tensor]] = [[], []]
    for r, out in zip(runners, logits, strict=True):
        out.append(r.prefill([0, 1, 2], [p[:50] for p in prompts], all_logits=True))
        out.append(r.prefill([0, 1, 2], [p[50 : 52 + i] for i, p in enumerate(prompts)], all_logits=True))
        out += [r.decode([2, 0, 1], torch.tensor([p[t] for p in prompts])) for t in range(60, 64)]
    a, b = (torch.cat(x).float() for x in logits)
    assert torch.nn.functional.cosine_similarity(a, b).mean() > 0.999
    assert kl_divergence(b, a).mean() < 1e-4


def test_quantize_linear_is_the_standard_operator() -> None:
    """Q and DQ equal onnx.reference: ties, subnormals, both sides of the largest number, and far beyond it."""
    from onnx.reference import ReferenceEvaluator

    F, F8 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT8E4M3FN
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", F, [None]), value("s", F, [])],
        [value("y", F, [None])],
        [onnx.helper.make_tensor("z", F8, [], [0])],
    )
    standard = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]))
    scale = torch.tensor(0.0371)
    exact = torch.arange(-480, 481, 0.0625)  # codes, halves between them, beyond the largest
    x = torch.cat([exact * scale, exact * 2**-9, torch.randn(500), torch.tensor([1e9, -1e9])])
    for s in (scale, torch.tensor(1.0), torch.tensor(2.0**-8)):
        (standards,) = standard.run(None, {"x": x.numpy(), "s": s.numpy()})
        expected = torch.from_numpy(np.asarray(standards))
        codes = HANDLERS["QuantizeLinear"]({}, x, s, torch.zeros((), dtype=FP8))
        dequantised = HANDLERS["DequantizeLinear"]({}, codes, s)
        assert isinstance(dequantised, torch.Tensor) and torch.equal(dequantised, expected)


# Errors


def edited(path: Path, change) -> Path:
    model = onnx.load(path, load_external_data=False)
    change(model)
    out = path.parent / "edited.onnx"
    onnx.save(model, out)
    return out


def test_unknown_op(fp8_file) -> None:
    def change(model) -> None:
        node = next(n for n in model.graph.node if n.op_type == "Sigmoid")
        node.op_type, node.name = "Erf", "erf_7"

    with pytest.raises(JetExportError, match="node erf_7 is a Erf, which the evaluator does not know"):
        OnnxModel.load(edited(fp8_file, change))
    OnnxModel.load(edited(fp8_file, change), handlers={"Erf": lambda a, x: x.erf()})


def test_other_version_of_the_nodes(fp8_file) -> None:
    def change(model) -> None:
        next(o for o in model.opset_import if o.domain == "jet").version = 1

    with pytest.raises(JetExportError, match="version 1 of the jet nodes, this jet-export has 2"):
        OnnxModel.load(edited(fp8_file, change))


def test_weights_missing(fp8_file, tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(fp8_file.read_bytes())
    with pytest.raises(JetExportError, match=r"weights.safetensors: missing or too short for initializer"):
        OnnxModel.load(tmp_path / "model.onnx")


def test_importing_jet_export_does_not_import_onnx() -> None:
    code = "import sys, jet_export.cli, jet_export.build, jet_export.runtime.llm; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
