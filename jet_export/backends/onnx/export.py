"""The model as an ONNX graph: model.onnx, whose weights stay in the bundle's weights.safetensors as external data.

inputs    input_ids [tokens] int64, cu_seqlens [sequences + 1], slots, context_lens [sequences], block_table
          [sequences, table_pages], window_block_table [sequences, ring_pages], logit_indices [outputs], all int32, and
          the states by name, in the order of cache.state_specs: layers.3.conv_state [slots, W-1, D], ...
outputs   logits [outputs, vocab], and each state after the step: layers.3.conv_state_out, ...

Opset 21. The mixers' cores are nodes of the domain `jet` (model/onnx_nodes.py). Tokens and sequences are independent
dimensions, so one graph serves prefill and decode: its nodes have the form MIXED. verify.onnx, in a bundle that
verifies drafts, is the same graph with nodes of the form VERIFY. A value is named after the module
that computes it (`layers.0.mlp.gate_up_proj`), a projection's input `....input`, an initializer as in the state dict.
Products are named after their modules, jet nodes `layers.0.self_attn.JetBlock`; TensorRT's layer reports repeat that.
An FP8 projection is QuantizeLinear / DequantizeLinear in fp32 before a product in the model dtype.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from jet_export.backends.graph import INPUTS, EngineGraph, dynamic_shapes, example_inputs, quiet_torch
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import WEIGHTS
from jet_export.kernels.form import Form
from jet_export.model.fp8 import Fp8Linear
from jet_export.model.jet_nemotron import DecoderLayer, JetNemotronForCausalLM
from jet_export.model.mode import graph_mode
from jet_export.model.onnx_nodes import DOMAIN
from jet_export.model.rms_norm import RMSNorm
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH, VERIFY_GRAPH = "model.onnx", "verify.onnx"
OPSET = 21
DIMENSIONS = {
    "input_ids": ("tokens",),
    "slots": ("sequences",),
    "block_table": ("sequences", "table_pages"),
    "window_block_table": ("sequences", "ring_pages"),
    "logit_indices": ("outputs",),
}
PROJECTION = (nn.Linear, Fp8Linear)


class OnnxGraph(EngineGraph):
    """The engine graph with the states after the step among its results."""

    def __init__(self, model: JetNemotronForCausalLM, form: Form, interval: int) -> None:
        super().__init__(model, form, interval)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        slots: Tensor,
        context_lens: Tensor,
        block_table: Tensor,
        window_block_table: Tensor,
        logit_indices: Tensor,
        states: list[Tensor],
    ) -> tuple[Tensor, ...]:
        with graph_mode("onnx") as states_out:
            logits = super().forward(
                input_ids, cu_seqlens, slots, context_lens, block_table, window_block_table, logit_indices, states
            )
        return logits, *states_out


def require_onnx() -> None:
    """Raises JetExportError where onnx or onnxscript is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise JetExportError(f"--backend onnx needs {e.name}.", "pip install 'jet-export[onnx]'") from None


def write_onnx(model: JetNemotronForCausalLM, directory: Path, dtypes: Dtypes, limits: Limits) -> Path:
    """Write model.onnx into `directory`, which holds this model's WEIGHTS, and verify.onnx where dtypes.rollback asks
    for it, and check them. No weight is read or copied; the model may be on any device."""
    require_onnx()
    fake = FakeTensorMode()
    model = structure_of(model, fake)
    if dtypes.rollback:
        write_graph(model, fake, directory / VERIFY_GRAPH, dtypes, limits)
    return write_graph(model, fake, directory / GRAPH, dtypes, limits)


def write_graph(
    model: JetNemotronForCausalLM, fake: FakeTensorMode, path: Path, dtypes: Dtypes, limits: Limits
) -> Path:
    """One of them, by its name. `model`: of fake tensors, see structure_of."""
    import onnx
    import onnx_ir as ir

    form = Form.VERIFY if path.name == VERIFY_GRAPH else Form.MIXED
    with fake:
        args = example_inputs(model, dtypes, "prefill")
    shapes = dynamic_shapes(model, dtypes, limits, "prefill")
    graph_module = OnnxGraph(model, form, dtypes.state_interval).eval()
    with torch.no_grad(), quiet_exporter():
        program = torch.export.export(graph_module, args, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.silu.default: silu},
        )
    assert exported is not None
    graph_model = exported.model
    graph = graph_model.graph
    specs = dtypes.specs(model.config)
    name_states(graph, [s.name for s in specs])
    name_dimensions(graph, [s.rows for s in specs])
    name_values(graph, model)
    set_zero_points(graph)
    simplify(graph_model)
    point_to_weights(graph, path.parent / WEIGHTS)
    drop_metadata(graph_model)
    ir.save(graph_model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def structure_of(model: JetNemotronForCausalLM, fake: FakeTensorMode) -> JetNemotronForCausalLM:
    """The model with fake tensors on the CPU, shapes without values: a graph has no device, and torch.onnx creates the
    results of symbolic nodes on the CPU whatever their inputs' device."""
    memo: dict[int, Any] = {}  # tied weights stay one
    with fake:
        for t in (*model.parameters(), *model.buffers()):
            empty = torch.empty(t.shape, dtype=t.dtype, device="cpu")
            memo[id(t)] = nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def silu(x: Any) -> Any:
    """x * sigmoid(x) in fp32 with one rounding, as torch computes it; torch.onnx's own rounds twice."""
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18
    if x.dtype == ir.DataType.FLOAT:
        return op.Mul(x, op.Sigmoid(x))
    wide = op.Cast(x, to=ir.DataType.FLOAT)
    return op.Cast(op.Mul(wide, op.Sigmoid(wide)), to=x.dtype)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """`quiet_torch`, and torch.onnx's warnings about its own operators."""
    import logging

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_torch(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def name_states(graph: ir.Graph, names: list[str]) -> None:
    for value, name in zip(graph.inputs, (*INPUTS, *names), strict=True):
        value.name = name
    for value, name in zip(graph.outputs, ("logits", *(f"{n}_out" for n in names)), strict=True):
        value.name = name


def name_dimensions(graph: ir.Graph, pool_rows: list[str]) -> None:
    """Rename symbolic sizes throughout the graph: `s37 + 1` becomes `sequences + 1`."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    by_input = {**DIMENSIONS}
    for value, rows in zip(graph.inputs[len(INPUTS) :], pool_rows, strict=True):
        by_input[str(value.name)] = (rows,)
    for value in graph.inputs:
        assert value.shape is not None
        for dim, name in zip(value.shape, by_input.get(str(value.name), ()), strict=False):
            if isinstance(dim, ir.SymbolicDim):
                names[str(dim.value)] = name

    def renamed(dim: Any) -> Any:
        if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
            return dim
        return ir.SymbolicDim(re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), str(dim.value)))

    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(d) for d in value.shape])


def module_path(node: ir.Node) -> str:
    """The module that a node belongs to, as the model names it."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2].removeprefix("model").removeprefix(".") if len(scopes) > 1 else ""


def name_values(graph: ir.Graph, model: JetNemotronForCausalLM) -> None:
    """Name the results of projections, norms and layers after their modules, the inputs of projections `<path>.input`,
    products after their projections, and jet nodes after their layers."""
    nodes: dict[str, list[ir.Node]] = {}
    for node in graph:
        path = module_path(node)
        for i, c in enumerate(path + "."):
            if c == "." and path[:i]:
                nodes.setdefault(path[:i], []).append(node)
    kept = {v.name for v in (*graph.inputs, *graph.outputs)}
    for node in graph:
        if node.domain == DOMAIN:
            node.name = f"{module_path(node)}.{node.op_type}"
    for path, module in model.named_modules():
        if not isinstance(module, (*PROJECTION, RMSNorm, DecoderLayer, nn.Embedding)) or path not in nodes:
            continue
        inside = {v for n in nodes[path] for v in n.outputs}
        result = nodes[path][-1].outputs[0]
        if result.name not in kept:
            result.name = path
            kept.add(path)
        if isinstance(module, PROJECTION):
            next(n for n in nodes[path] if n.op_type in ("Gemm", "MatMul")).name = path
            read = next(v for n in nodes[path] for v in n.inputs if v is not None and v.producer() and v not in inside)
            if read.name not in kept:
                read.name = f"{path}.input"
                kept.add(read.name)


def set_zero_points(graph: ir.Graph) -> None:
    """Make Q and DQ per tensor: scalar scales, and an FP8 zero point, which sets QuantizeLinear's output type."""
    import onnx_ir as ir

    pairs = [n for n in graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if not pairs:
        return
    zero = ir.Tensor(torch.zeros((), dtype=torch.uint8).numpy().view(ir.DataType.FLOAT8E4M3FN.numpy()), name="fp8_zero")
    value = ir.Value(name="fp8_zero", type=ir.TensorType(zero.dtype), shape=ir.Shape([]), const_value=zero)
    graph.register_initializer(value)
    for node in pairs:
        scale = node.inputs[1]
        assert scale is not None
        scale.shape = ir.Shape([])
        node.resize_inputs(3)
        node.replace_input_with(2, value)
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = ir.DataType.FLOAT8E4M3FN


def simplify(model: ir.Model) -> None:
    """Fold arithmetic on constants (slice bounds, axes) but not on weights, and drop unused nodes."""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    weights = {v for v in model.graph.initializers.values() if v.name != "fp8_zero"}

    def should_fold(node: ir.Node) -> bool | None:
        return False if weights.intersection(v for v in node.inputs if v is not None) else None

    fold_constants(model, onnx_shape_inference=False, should_fold=should_fold)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)


def drop_metadata(model: ir.Model) -> None:
    """Remove torch's metadata from nodes and values: stack traces, with paths of the machine that builds."""
    model.producer_name, model.graph.name = "jet-export", "jet_nemotron"
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def point_to_weights(graph: ir.Graph, file: Path) -> None:
    """Give weights the state dict's names, and make them external data in the safetensors file."""
    import onnx_ir as ir

    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        entries = json.loads(f.read(size))
    for value in list(graph.initializers.values()):
        name = str(value.name).removeprefix("model.")
        if name == "lm_head.weight" and name not in entries:
            name = "embed_tokens.weight"  # tied: one initializer
        if name not in entries:
            continue
        assert value.const_value is not None and value.shape is not None
        begin, end = entries[name]["data_offsets"]
        value.name = name
        value.const_value = ir.ExternalTensor(
            file.name,
            offset=8 + size + begin,
            length=end - begin,
            dtype=value.const_value.dtype,
            shape=ir.Shape(value.shape),
            name=name,
            base_dir=file.parent,
        )
