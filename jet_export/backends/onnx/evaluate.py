"""Evaluates an ONNX graph node by node on torch tensors, on any device, without an ONNX runtime.

`HANDLERS` has one function for each op type that onnx/export.py emits, written from the operator's definition (opset
21). Nodes of the domain `jet` run the ops of `jet_export.kernels` on copies of their states; other handlers, such as
the plugin library's, can replace them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jet_export.kernels import attention as _attention  # noqa: F401  registers jet::attention
from jet_export.kernels import jet_block as _jet_block  # noqa: F401  registers jet::jet_block
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.model.onnx_nodes import DOMAIN, VERSION
from jet_export.utils.errors import JetExportError

Attributes = dict[str, Any]
Handler = Callable[..., Tensor | tuple[Tensor, ...]]  # (attributes, *inputs) -> output, or outputs
Observer = Callable[[str, Tensor], Tensor]  # (name, value) -> the value that later nodes read

DTYPES = {
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
}  # of TensorProto.DataType
FP8_MAX = 448.0


class Node(NamedTuple):
    op: str  # "Gemm", "jet::JetBlock"
    name: str
    inputs: tuple[str, ...]  # "": an omitted optional input
    outputs: tuple[str, ...]
    attributes: Attributes


def gemm(a: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    x, w = x.t() if a.get("transA") else x, w.t() if a.get("transB") else w
    if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0:
        raise JetExportError("ONNX: Gemm with alpha or beta other than 1 is not emitted by jet-export.")
    return torch.nn.functional.linear(x, w.t(), bias)


def reduce_mean(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    return x.mean(axes.tolist(), keepdim=bool(a.get("keepdims", 1)))


def slice_(a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor) -> Tensor:
    index = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes.tolist(), starts.tolist(), ends.tolist(), steps.tolist(), strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    return torch.split(x, sizes.tolist(), axis) if sizes is not None else x.chunk(a["num_outputs"], axis)


def gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Rows: along axis 0, with indices that are not negative."""
    if a.get("axis", 0) != 0 or indices.dim() != 1:
        raise JetExportError("ONNX: only Gather of rows is emitted by jet-export.")
    return x.index_select(0, indices)


def reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = [x.shape[i] if n == 0 and not a.get("allowzero") else n for i, n in enumerate(shape.tolist())]
    return x.reshape(sizes)


def quantize_linear(a: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """saturate(round to nearest even(x / scale)); zero points of FP8 are 0. Per tensor."""
    _check_per_tensor(scale)
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(zero_point.dtype)


def dequantize_linear(a: Attributes, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """codes * scale in the scale's dtype."""
    _check_per_tensor(scale)
    return codes.to(scale.dtype) * scale


def _check_per_tensor(scale: Tensor) -> None:
    if scale.dim() != 0:
        raise JetExportError("ONNX: only QuantizeLinear and DequantizeLinear per tensor are emitted by jet-export.")


def jet_block(a: Attributes, *inputs: Tensor) -> tuple[Tensor, ...]:
    """o, conv_state_out, recurrent_state_out; beside a step buffer also step_buffer_out, state_position_out."""
    projections, states, batch = inputs[:6], [x.clone() for x in inputs[6:8]], inputs[8:11]
    beside = [x.clone() for x in inputs[11:]]  # step_buffer, state_position
    sizes = a["num_heads"], a["head_k_dim"], a["head_v_dim"], a["norm_eps"], a["form"]
    buffer = (*beside, a["interval"]) if beside else NO_BUFFER
    o = torch.ops.jet.jet_block(*projections, *states, *batch, *sizes, *buffer, None)
    return o, *states, *beside


def attention(a: Attributes, qkv: Tensor, cos_sin: Tensor, kv_cache: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
    """o, kv_cache_out. `batch`: block_table, cu_seqlens, slots, context_lens."""
    cache = kv_cache.clone()
    sizes = [a[n] for n in ("num_heads", "num_kv_heads", "head_dim", "window", "k_scale", "v_scale", "form")]
    return torch.ops.jet.attention(qkv, cos_sin, cache, *batch, *sizes), cache


HANDLERS: dict[str, Handler] = {
    "Add": lambda a, x, y: x + y,
    "Cast": lambda a, x: x.to(DTYPES[a["to"]]),
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "DequantizeLinear": dequantize_linear,
    "Gather": gather,
    "Gemm": gemm,
    "MatMul": lambda a, x, y: x @ y,
    "Mul": lambda a, x, y: x * y,
    "Pow": lambda a, x, y: x**y,
    "QuantizeLinear": quantize_linear,
    "Reciprocal": lambda a, x: x.reciprocal(),
    "ReduceMean": reduce_mean,
    "Reshape": reshape,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")], device=x.device),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": slice_,
    "Split": split,
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": lambda a, x: x.squeeze(),
    "Transpose": lambda a, x: x.permute(*a["perm"]),
    f"{DOMAIN}::JetBlock": jet_block,
    f"{DOMAIN}::JetAttention": attention,
}


@dataclass
class OnnxModel:
    """A graph, ready to run. `inputs`, `outputs`: the names that `run` takes and returns, in the graph's order."""

    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    constants: dict[str, Tensor]  # initializers
    handlers: dict[str, Handler]

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", handlers: Mapping[str, Handler] | None = None
    ) -> OnnxModel:
        """Read a file; on a CPU, weights stay mapped from disk. `handlers` replace or add op types ("jet::JetBlock").

        Raises JetExportError for an op type without a handler, for another version of the jet nodes, and where onnx is
        not installed.
        """
        onnx = _import_onnx()
        path, table = Path(path), {**HANDLERS, **(handlers or {})}
        model = onnx.load(path, load_external_data=False)
        opsets = {o.domain: o.version for o in model.opset_import}
        if opsets.get(DOMAIN, VERSION) != VERSION:
            raise JetExportError(f"{path}: version {opsets[DOMAIN]} of the jet nodes, this jet-export has {VERSION}.")
        graph = model.graph
        nodes = [_read_node(n, onnx.helper.get_attribute_value) for n in graph.node]
        for node in nodes:
            if node.op not in table:
                raise JetExportError(
                    f"{path}: node {node.name} is a {node.op}, which the evaluator does not know.",
                    "It runs the graphs that this version of jet-export writes.",
                )
        constants = {t.name: _read_tensor(t, path.parent, onnx).to(device) for t in graph.initializer}
        inputs = [v.name for v in graph.input if v.name not in constants]
        return cls(inputs, [v.name for v in graph.output], nodes, constants, table)

    @torch.inference_mode()
    def run(self, feeds: Mapping[str, Tensor], observe: Observer | None = None) -> dict[str, Tensor]:
        """Evaluate on `feeds` (each of `inputs` by name, left unchanged); returns `outputs` by name.

        `observe` is called with every result, and returns the value that later nodes read in its place.
        """
        missing = [n for n in self.inputs if n not in feeds]
        if missing:
            raise JetExportError(f"ONNX: input {missing[0]} is not given.")
        values: dict[str, Tensor] = {**self.constants, **feeds}
        reads = Counter(name for node in self.nodes for name in node.inputs) + Counter(self.outputs)
        for node in self.nodes:
            inputs = [values[name] if name else None for name in node.inputs]
            results = self.handlers[node.op](node.attributes, *inputs)
            results = results if isinstance(results, tuple) else (results,)
            for name, value in zip(node.outputs, results, strict=True):
                values[name] = observe(name, value) if observe else value
            for name in node.inputs:  # drop what no later node reads
                reads[name] -= 1
                if not reads[name]:
                    values.pop(name, None)
        return {name: values[name] for name in self.outputs}


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise JetExportError("reading an ONNX file needs onnx.", "pip install 'jet-export[onnx]'") from None
    return onnx


def _read_node(n: Any, value: Callable[[Any], Any]) -> Node:
    op = f"{n.domain}::{n.op_type}" if n.domain not in ("", "ai.onnx") else n.op_type
    return Node(op, n.name, tuple(n.input), tuple(n.output), {a.name: value(a) for a in n.attribute})


def _read_tensor(t: Any, directory: Path, onnx: Any) -> Tensor:
    """An initializer: mapped from its external file, or copied from the graph."""
    if t.data_type not in DTYPES:
        raise JetExportError(f"ONNX: initializer {t.name} has data type {t.data_type}, which jet-export does not emit.")
    dtype = DTYPES[t.data_type]
    if t.data_location != onnx.TensorProto.EXTERNAL:
        array = onnx.numpy_helper.to_array(t)
        raw = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8)
        return raw.view(dtype).reshape(tuple(t.dims))
    where = {e.key: e.value for e in t.external_data}
    file, offset, length = directory / where["location"], int(where.get("offset", 0)), int(where["length"])
    if not file.is_file() or file.stat().st_size < offset + length:
        raise JetExportError(f"{file}: missing or too short for initializer {t.name}.", "Build the bundle again.")
    raw = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    raw = raw[offset : offset + length]
    if offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(tuple(t.dims))
