"""The layer report: what a built engine really runs, read from TensorRT's own dump (detailed profiling verbosity).

It lists every layer of each profile with its tensors and the ONNX nodes that it implements. A kernel that only moves or
casts data is a copy. `check` compares the report with the graph: in each profile, each jet node must be one plugin,
bound directly to its states and with no copy next to it, and each product one GEMM, FP8 where the model's is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jet_export.backends.tensorrt.profiles import NAMES

REPORT, VERIFY_REPORT = "layers.json", "verify_layers.json"  # in a bundle

# TensorRT's terms -> ours
DTYPES = {"FP8": "fp8", "BFloat16": "bf16", "BF16": "bf16", "Float": "fp32", "FP32": "fp32", "Half": "fp16",
          "FP16": "fp16", "Int32": "int32", "INT32": "int32", "Int64": "int64", "INT64": "int64", "Bool": "bool",
          "UInt8": "uint8", "INT8": "int8", "Int8": "int8"}  # fmt: skip
KINDS = {"custom_layer": "plugin", "pluginv3": "plugin", "gemm": "gemm", "matrixmultiply": "gemm", "kgen": "kernel",
         "signal": "sync", "wait": "sync", "reformat": "copy", "copy": "copy", "noop": "copy"}  # fmt: skip
# A fused kernel's name lists its steps. Those that make it a GEMM:
PRODUCTS = {"Fc", "Gemm", "Matm", "Dot"}
# Those that compute nothing:
MOVES = {"Cast", "Conc", "Copy", "Move", "Slic", "Tran", "Resh", "Repl", "Expa", "Pad", "Shuf", "Reform"}


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: str
    dims: tuple[int, ...]  # -1: free


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str  # plugin, gemm, kernel, copy, sync, or TensorRT's own term
    profile: int
    inputs: tuple[TensorInfo, ...]  # without constants
    constants: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    nodes: tuple[str, ...]  # of the ONNX graph

    @property
    def precision(self) -> str:
        """A GEMM's dtypes: "fp8 x fp8 -> bf16"."""
        read = [t.dtype for t in self.inputs if len(t.dims) > 1]  # maybe with a residual to add
        x = "fp8" if "fp8" in read else read[0] if read else "?"
        w = next((t.dtype for t in self.constants if len(t.dims) > 1 and min(t.dims) > 1), read[-1] if read else "?")
        return f"{x} x {w} -> {self.outputs[0].dtype if self.outputs else '?'}"

    @property
    def named(self) -> list[str]:
        """Those of its nodes that are named after a module: projections and jet nodes."""
        return [n for n in (*self.nodes, self.name) if n.startswith(("layers.", "lm_head"))]


@dataclass
class LayerReport:
    layers: list[Layer]
    # name, output, host, dtype, dims; profiles: min, opt, max
    bindings: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [asdict(layer) for layer in self.layers], "bindings": self.bindings}

    @classmethod
    def load(cls, path: Path) -> LayerReport:
        values = json.loads(path.read_text())
        lists = "inputs", "constants", "outputs"
        layers = []
        for v in values["layers"]:
            tensors = {k: tuple(TensorInfo(t["name"], t["dtype"], tuple(t["dims"])) for t in v[k]) for k in lists}
            layers.append(Layer(v["name"], v["kind"], v["profile"], nodes=tuple(v["nodes"]), **tensors))
        return cls(layers, values["bindings"])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict()) + "\n")

    def of(self, kind: str, node: str, profile: int) -> list[Layer]:
        return [x for x in self.layers if x.kind == kind and x.profile == profile and node in (*x.nodes, x.name)]


def read_dump(text: str) -> LayerReport:
    """Parse the text that TensorRT logs after a build; a report without layers where the text has none."""
    lines = [line for line in text.splitlines() if line.startswith("Name: ") and ", LayerType: " in line]
    raw = [_read_layer(line) for line in lines]
    by_group = {
        group: profile for _, group, profile in raw if group and profile
    }  # a fused region belongs to one profile
    layers = [Layer(profile=profile or by_group.get(group, 0), **values) for values, group, profile in raw]
    bindings = [_read_binding(line) for line in text.splitlines() if ", IOMode: " in line]
    return LayerReport(layers, bindings)


def _read_layer(line: str) -> tuple[dict[str, Any], str, int]:
    """A layer's fields, its fused region ("" for none), and its profile (0 where the line names none)."""
    full, word = _after(line, "Name: "), _after(line, "LayerType: ")
    tagged = re.search(r"\[profile (\d+)\]", line)
    region = re.search(r"_myl(\d+)_\d+$", full)
    name = re.sub(r" ?\[profile \d+\]|_myl\d+_\d+$", "", full)
    kind = KINDS.get(word.lower(), word)
    steps = re.findall(r"[A-Z][a-z]*", name.removeprefix("__myl_")) if name.startswith("__myl_") else []
    if "Reformatting CopyNode" in name or (steps and MOVES.issuperset(steps)):
        kind = "copy"
    elif PRODUCTS.intersection(steps):
        kind = "gemm"
    values = {
        "name": name,
        "kind": kind,
        "inputs": _read_tensors(line, "Inputs: ["),
        "constants": _read_tensors(line, "Constants: ["),
        "outputs": _read_tensors(line, "Outputs: ["),
        "nodes": tuple(re.findall(r"\[ONNX Layer: (.*?)\]", line)),
    }
    return values, region[1] if region else "", int(tagged[1]) if tagged else 0


def _after(line: str, key: str) -> str:
    return line.split(key, 1)[1].split(", ", 1)[0]


def _read_tensors(line: str, key: str) -> tuple[TensorInfo, ...]:
    if key not in line:
        return ()
    text, depth = line.split(key, 1)[1], 1
    for end, c in enumerate(text):
        depth += (c == "[") - (c == "]")
        if depth == 0:
            text = text[:end]
            break
    found = []
    for part in text.split("{ Name: ")[1:]:
        dims = re.search(r"Dimensions: \[(.*?)\]", part)
        words = re.findall(r"\w+", part.split("Datatype: ", 1)[1]) if "Datatype: " in part else []
        dtype = next((DTYPES[w] for w in words if w in DTYPES), "?")
        name = re.sub(r" ?\[profile \d+\]", "", part.split(", ", 1)[0])
        found.append(TensorInfo(name, dtype, _ints(dims[1]) if dims else ()))
    return tuple(found)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())


def _read_binding(line: str) -> dict[str, Any]:
    shapes = re.findall(r"MinShape: \[(.*?)\], OptShape: \[(.*?)\], MaxShape: \[(.*?)\]", line)
    dims = re.search(r"Dimensions: \[(.*?)\]", line)
    return {
        "name": _after(line, "Name: "),
        "output": _after(line, "IOMode: ") == "Output",
        "host": ", Location: Host" in line,
        "dtype": DTYPES.get(_after(line, "DataType: "), "?"),
        "dims": _ints(dims[1]) if dims else (),
        "profiles": [[_ints(shape) for shape in shapes] for shapes in shapes],
    }


@dataclass(frozen=True)
class Expected:
    """What the graph requires of the engine."""

    plugins: dict[str, tuple[str, ...]]  # jet node -> the graph's inputs and outputs that are its states
    products: dict[str, bool]  # Gemm or MatMul node -> FP8


def expected(graph: Path, fp8: Iterable[str]) -> Expected:
    """Read the requirements from the graph. `fp8`: published names of the model's FP8 layers."""
    import onnx

    g = onnx.load(graph, load_external_data=False).graph
    quantised = {name.removeprefix("model.") for name in fp8}
    bound = {v.name for v in (*g.input, *g.output) if v.name.startswith("layers.")}
    plugins, products = {}, {}
    for node in g.node:
        if node.domain == "jet":
            plugins[node.name] = tuple(n for n in (*node.input, *node.output) if n in bound)
        elif node.op_type in ("Gemm", "MatMul"):
            products[node.name] = node.name in quantised
    return Expected(plugins, products)


def check(report: LayerReport, want: Expected, names: tuple[str, ...] = NAMES) -> list[str]:
    """One line for each requirement that the engine violates. `names`: of its profiles."""
    if not report.layers:
        return ["TensorRT logged no layers, so the engine cannot be checked"]
    hosts = [f"{b['name']} is bound on the host, where no call binds it" for b in report.bindings if b["host"]]
    return hosts + [f for i, name in enumerate(names) for f in _check_profile(report, want, i, name)]


def _check_profile(report: LayerReport, want: Expected, profile: int, where: str) -> Iterator[str]:
    layers = [x for x in report.layers if x.profile == profile]
    for node, states in want.plugins.items():
        found = report.of("plugin", node, profile)
        if len(found) != 1:
            yield f"{where}: {node} is {len(found)} plugin layers, not one"
        for plugin in found:
            yield from (f"{where}: {node}: {problem}" for problem in _beside(plugin, layers, states))
    extra = sum(x.kind == "plugin" for x in layers) - len(want.plugins)
    if extra > 0:
        yield f"{where}: {extra} plugin layers more than the graph has jet nodes"
    for node, fp8 in want.products.items():
        gemms = report.of("gemm", node, profile)
        if len(gemms) != 1:
            yield f"{where}: {node} is {len(gemms)} GEMMs, not one"
        for gemm in gemms:
            if gemm.precision.startswith("fp8 x fp8") != fp8:
                yield f"{where}: {node} must {'' if fp8 else 'not '}be an FP8 GEMM, and is {gemm.precision}"


def _beside(plugin: Layer, layers: list[Layer], states: tuple[str, ...]) -> Iterator[str]:
    """Problems between a plugin and the layers that produce its inputs or read its outputs."""
    made = {t.name: x for x in layers for t in x.outputs}
    read = {t.name: x for x in layers for t in x.inputs}
    names = {t.name for t in (*plugin.inputs, *plugin.outputs)}
    for state in states:
        if state not in names:
            yield f"{state} is not bound to the plugin itself"
    for tensor in plugin.inputs:
        maker = made.get(tensor.name)
        if maker is not None and maker.kind == "copy":
            yield f"a copy ({maker.name}) produces its input {tensor.name}"
    for tensor in plugin.outputs:
        reader = read.get(tensor.name)
        if reader is not None and reader.kind == "copy":
            yield f"a copy ({reader.name}) reads its output {tensor.name}"


@dataclass(frozen=True)
class Row:
    """Layers that do the same thing in different layers of the model."""

    what: str  # "GEMM", "plugin", ...
    name: str  # "mlp.down_proj"
    precision: str
    counts: tuple[int, ...]  # by profile


def rows(report: LayerReport, names: tuple[str, ...] = NAMES) -> list[Row]:
    """GEMMs by projection and precision, plugins by node, the rest by kind. Copies always have a row. `names`: of the
    engine's profiles."""
    counts: dict[tuple[str, str, str], Counter[int]] = {("copies", "", ""): Counter()}
    titles = {"gemm": "GEMM", "kernel": "fused elementwise kernels", "copy": "copies", "sync": ""}
    for layer in report.layers:
        title = titles.get(layer.kind, layer.kind)
        if title:
            named = layer.named if layer.kind in ("gemm", "plugin") else []
            found = dict.fromkeys(re.sub(r"^layers\.\d+\.", "", n) for n in named if n in layer.nodes) or named
            key = title, " + ".join(found), layer.precision if layer.kind == "gemm" else ""
            counts.setdefault(key, Counter())[layer.profile] += 1
    order = {"plugin": 0, "GEMM": 1, "copies": 9}
    keys = sorted(counts, key=lambda k: (order.get(k[0], 5), k))
    return [Row(*k, tuple(counts[k][p] for p in range(len(names)))) for k in keys]
