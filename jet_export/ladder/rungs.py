"""What each rung checks. A rung is given what is known of the bundle and returns figures and failures, or skips.

python -m jet_export.ladder.rungs NAME SPEC.json RESULT.json        a rung in a process of its own
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from jet_export.backends.eager import EagerEngine, load_eager, load_weights
from jet_export.bundle.dtypes import torch_dtype
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.ladder.inputs import RUNS, NodeInputs, attributes_of, node_of, random_inputs
from jet_export.plugins.cases import AttentionCase, Case, JetBlockCase, label, model_cases
from jet_export.utils.errors import JetExportError


class Skipped(Exception):
    """A rung that cannot run here, and why. It has not passed."""


@dataclass
class Outcome:
    """Of a rung that ran."""

    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Site:
    """A bundle on this machine. `work`: a folder for what rungs make."""

    bundle: Path
    work: Path
    headers: Path | None = None
    fetch_headers: bool = False
    text: Path | None = None
    seed: int = 0

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.load(self.bundle)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def sm(self) -> int | None:
        if self.device.type != "cuda":
            return None
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    @cached_property
    def cases(self) -> list[Case]:
        m = self.manifest
        return model_cases(m.config, m.dtype, m.state_dtype, m.kv_cache_dtype)

    @cached_property
    def eager(self) -> EagerEngine:
        """The PyTorch model that holds the bundle's weights, on this machine's device whatever the engine is for."""
        here = replace(self.manifest, target={**self.manifest.target, "device": self.device.type})
        return load_eager(self.bundle, here, load_weights(self.bundle, here))

    def plugin_library(self) -> Path:
        """The folder of the bundle's plugin library, or one built for its model; without a GPU for SM 9.0."""
        from jet_export.plugins.library import NAME, library_for

        if (self.bundle / NAME).is_file():
            return self.bundle
        m = self.manifest
        names = m.dtype, m.state_dtype, m.kv_cache_dtype
        return library_for(m.config, [self.sm or 90], *names, self.headers, self.fetch_headers, print)

    def graph(self) -> Path:
        """The bundle's ONNX graph, or its model's exported again."""
        from jet_export.backends.onnx.export import GRAPH, require_onnx, write_onnx
        from jet_export.bundle.limits import max_prefill_tokens

        if (self.bundle / GRAPH).is_file():
            return self.bundle / GRAPH
        require_onnx()
        if not (self.work / WEIGHTS).exists():
            shutil.copyfile(self.bundle / WEIGHTS, self.work / WEIGHTS)  # onnx's checker takes no links
        head, embedding = self.eager.model.lm_head, self.eager.model.embed_tokens
        held = getattr(head, "weight", None)
        if held is not None and held.data_ptr() == embedding.weight.data_ptr():
            head.weight = embedding.weight  # one initializer, as the file has one tensor
        m, limits = self.manifest, self.manifest.limits
        tokens = max_prefill_tokens(limits.max_batch_size, limits.prefill_chunk)
        dtypes = torch_dtype(m.kv_cache_dtype), torch_dtype(m.state_dtype)
        return write_onnx(self.eager.model, self.work, *dtypes, tokens, limits.max_batch_size)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b|| in fp64."""
    a, b = a.cpu().double(), b.cpu().double()
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


def bound_of(case: Case) -> float:
    """16 bits: two operands of a product and the result are rounded, a unit roundoff each. fp32: another order."""
    return 1e-5 if case.dtype == "float32" else 3 * torch.finfo(getattr(torch, case.dtype)).eps / 2


SMALL: list[Case] = [  # what Triton's interpreter does in seconds, and rightly: fp32
    JetBlockCase(2, 32, 32, 4, "float32", "float32"),
    AttentionCase(4, 2, 32, 16, 0, "float32", "float32"),
    AttentionCase(4, 2, 32, 16, 12, "float32", "float32"),
]
SMALL_RUNS = {"ragged prefill": ([1, 17, 20], [0, 9, 5]), "decode": ([1, 1, 1], [9, 30, 0])}


def kernels(site: Site) -> Outcome:
    """The Triton kernels against their references: the model's own dimensions on a GPU, small ones without."""
    from jet_export.kernels.common import INTERPRET

    interpreted = site.device.type == "cpu"
    if interpreted and not INTERPRET:
        raise Skipped("no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)")
    out = Outcome({"kernels": "Triton's interpreter, small sizes in fp32" if interpreted else "this GPU's"})
    for case in SMALL if interpreted else site.cases:
        for run, (lens, context) in (SMALL_RUNS if interpreted else RUNS).items():
            inputs = random_inputs(case, lens, context, site.device, site.seed)
            got = launch_interpreted(inputs) if interpreted else inputs.op()
            compare(out, f"{label(case)}: {run}", got, inputs.reference(), bound_of(case))
    return out


def launch_interpreted(inputs: NodeInputs) -> list[torch.Tensor]:
    """What the op does on a GPU, by the interpreter: on a CPU the op itself is the reference."""
    from jet_export.kernels.attention_decode import attention_decode_triton
    from jet_export.kernels.attention_prefill import attention_prefill_triton
    from jet_export.kernels.jet_block import jet_block_triton

    copy = NodeInputs(inputs.case, [t.clone() for t in inputs.tensors], inputs.attributes)
    t, sizes = copy.tensors, tuple(inputs.attributes.values())
    launcher: Callable[..., torch.Tensor] = jet_block_triton
    arguments: tuple = (*t, *sizes, inputs.decode)
    if inputs.node == "JetAttention":
        launcher = attention_decode_triton if inputs.decode else attention_prefill_triton
        arguments = (*t[:4], *t[5:], *sizes) if inputs.decode else (*t, *sizes)
    return [launcher(*arguments), *copy.states()]


def compare(out: Outcome, what: str, got: list[torch.Tensor], want: list[torch.Tensor], bound: float) -> None:
    """Adds the largest relative error of the output and the states."""
    error = max((relative(a, b) for a, b in zip(got, want, strict=True)), key=lambda e: (e != e, e))
    out.figures[what] = error
    if not error <= bound:
        out.failures.append(f"{what}: relative error {error:.3g}, bound {bound:.3g}")


def harness_of(site: Site) -> tuple[Any, Path]:
    """The C harness over the plugin library, and that library's folder."""
    from jet_export.plugins.harness.build import harness_library
    from jet_export.plugins.harness.objects import Harness
    from jet_export.plugins.headers import headers_for
    from jet_export.plugins.library import NAME, require_tools

    try:
        require_tools(site.headers, site.fetch_headers)
        headers = headers_for(site.headers, site.fetch_headers)
    except JetExportError as e:
        raise Skipped(str(e).replace("\n", " ")) from None
    folder = site.plugin_library()
    return Harness(harness_library(headers), folder / NAME), folder


def plugin_objects(site: Site) -> Outcome:
    """The plugin objects, which no GPU is needed for: created from the model's attributes, serialised and read back,
    asked for shapes, formats and workspace; what is wrong must be refused."""
    from jet_export.plugins.harness.nodes import described

    harness, _ = harness_of(site)
    out = Outcome()

    def expect(case: Case, what: str, right: bool) -> None:
        if not right:
            out.failures.append(f"{label(case)}: {what}: {harness.messages().strip() or 'wrong'}")

    for case in site.cases:
        node, attributes = node_of(case), attributes_of(case)
        plugin = harness.create(node, attributes)
        expect(case, "is not created", bool(plugin))
        if not plugin:
            continue
        inputs = described(random_inputs(case, *RUNS["ragged prefill"], "cpu").tensors)
        again = harness.round_trip(node, plugin)
        expect(case, "does not survive serialisation", bool(again))
        size = harness.workspace(node, plugin, inputs)
        if again:
            same = harness.outputs(node, again, inputs) == harness.outputs(node, plugin, inputs)
            expect(case, "read back, it answers otherwise", same and harness.workspace(node, again, inputs) == size)
        descs = harness.with_outputs(node, plugin, inputs)
        expect(case, "refuses its own dtypes", all(harness.supports(node, plugin, i, descs) for i in range(len(descs))))
        other = [harness.supports(node, plugin, i, descs, layout=1) for i in range(len(descs))]
        expect(case, "takes a tensor that is not laid out linearly", not any(other))
        expect(case, "is not configured", harness.configure(node, plugin, inputs) == 0)
        wrong = [("float16", inputs[0][1]), *inputs[1:]]
        expect(case, "takes a dtype it has no kernels for", harness.configure(node, plugin, wrong) != 0)
        expect(case, "reads another library's plugin", not harness.round_trip(node, plugin, alter="digest"))
        expect(case, "takes an unknown field", not harness.create(node, attributes | {"typo": 1}))
        harness.messages()
        out.figures[f"{label(case)}: workspace, bytes"] = size
    return out


def plugin_outputs(site: Site) -> Outcome:
    """Plugins enqueued on this GPU against the torch ops: states in place and apart, then from a CUDA graph."""
    from jet_export.plugins.harness.nodes import PluginNode

    harness, folder = harness_of(site)
    out = Outcome({"library": "the bundle's" if folder == site.bundle else "built now"})
    for case in site.cases:
        node = PluginNode(harness, node_of(case), attributes_of(case))
        for run, (lens, context) in RUNS.items():
            inputs = random_inputs(case, lens, context, site.device, site.seed)
            want = inputs.op()
            compare(out, f"{label(case)}: {run}, states apart", list(node(*inputs.tensors)), want, bound_of(case))
            compare(out, f"{label(case)}: {run}, in place", enqueue_in_place(node, inputs, False), want, bound_of(case))
            if run == "decode":
                compare(out, f"{label(case)}: CUDA graph", enqueue_in_place(node, inputs, True), want, bound_of(case))
        node.close()
    return out


def enqueue_in_place(node: Any, inputs: NodeInputs, graph: bool) -> list[torch.Tensor]:
    tensors = [t.clone() for t in inputs.tensors]
    states = NodeInputs(inputs.case, tensors, inputs.attributes).states()
    (dtype, shape), *_ = node.output_shapes(tensors)
    o = torch.empty(shape, dtype=getattr(torch, dtype), device=tensors[0].device)
    workspace = node.workspace(tensors)
    if not graph:
        node.enqueue(tensors, [o, *states], workspace)
        return [o, *states]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        node.enqueue(tensors, [o, *states], workspace)
    captured.replay()
    return [o, *states]


def onnx(site: Site) -> Outcome:
    """The ONNX graph against the model: every node on the model's own inputs, then end to end; on a GPU every node
    again with the plugins in place of the torch ops."""
    from jet_export.backends.onnx.engine import OnnxEngine
    from jet_export.backends.onnx.evaluate import OnnxModel
    from jet_export.plugins.harness.nodes import plugin_handlers
    from jet_export.verify.onnx import forced_stage
    from jet_export.verify.verify import verify_engines

    try:
        graph = site.graph()
    except JetExportError as e:
        if "onnx" in str(e).splitlines()[-1]:  # pip install 'jet-export[onnx]'
            raise Skipped(str(e).replace("\n", " ")) from None
        raise

    def engine_over(handlers: dict[str, Any] | None) -> OnnxEngine:
        e = site.eager
        return OnnxEngine(OnnxModel.load(graph, e.device, handlers), e.config, e.limits, e.specs, e.dtype, e.device)

    engine = engine_over(None)
    out = Outcome(failures=list(forced_stage(engine, site.eager, site.seed).failures))
    if not out.failures and site.device.type == "cuda":
        try:
            harness_of(site)
        except Skipped as e:
            out.figures["plugins in the graph"] = f"skipped: {e}"
        else:
            handlers = plugin_handlers(site.plugin_library(), site.headers)
            out.failures += forced_stage(engine_over(handlers), site.eager, site.seed).failures
            out.figures["plugins in the graph"] = "ran"
    if not out.failures:
        for stage in verify_engines(engine, site.eager, seed=site.seed):
            out.failures += stage.failures
            out.figures[stage.name] = {m.what: m.relative for m in stage.measures if m.what == "logits"}
    return out


def verification(site: Site) -> dict[str, Any]:
    """`jet-export verify` of the bundle's engine, once for the two rungs that read it."""
    from jet_export.backends.load import check_bundle
    from jet_export.verify.verify import verify_bundle

    path = site.work / "verification.json"
    if not path.is_file():
        check_bundle(site.bundle, site.manifest)
        result = verify_bundle(site.bundle, site.text, site.seed, print)
        path.write_text(json.dumps(result.to_dict()))
    return json.loads(path.read_text())


def is_logits(failure: str) -> bool:
    """Whether a line of verify's is about what comes out, not about a layer's state."""
    return ": logits: " in failure or failure.startswith(("held-out", "bits per byte", "decode by CUDA graph"))


def engine_layers(site: Site) -> Outcome:
    """The built engine against the model, every layer's states after every step."""
    found = verification(site)
    worst: dict[str, float] = {}
    for stage in found["stages"]:
        for m in stage["measures"]:
            if m["what"] != "logits":
                worst[m["what"]] = max(worst.get(m["what"], 0.0), m["relative"])
    out = Outcome({"largest relative error": worst}, [f for f in found["failures"] if not is_logits(f)])
    layers = site.bundle / "layers.json"
    if layers.is_file():
        from jet_export.backends.tensorrt.layers import LayerReport, rows

        out.figures["layer report"] = [asdict(row) for row in rows(LayerReport.load(layers))]
    return out


def logits(site: Site) -> Outcome:
    """The built engine's logits against the model's, and held-out text."""
    found = verification(site)
    figures = {
        stage["stage"]: next((m for m in stage["measures"] if m["what"] == "logits"), None) for stage in found["stages"]
    }
    return Outcome(figures | {"held-out text": found["quality"]}, [f for f in found["failures"] if is_logits(f)])


def no_gpu(site: Site) -> str:
    return "" if site.device.type == "cuda" else "no GPU"


def no_engine(site: Site) -> str:
    m = site.manifest
    if m.backend["name"] == "onnx":
        return "the bundle is an ONNX graph, which holds no engine"
    if m.device.type == "cuda" and site.device.type != "cuda":
        return f"the engine is for a GPU ({m.target['arch']}), and there is none here"
    return ""


# Why a rung cannot run here, where that is known before anything heavy is imported; "" where it is not.
GUARDS: dict[str, Callable[[Site], str]] = {
    "plugin outputs": no_gpu,
    "engine, layer by layer": no_engine,
    "logits": no_engine,
}
RUNGS: dict[str, Callable[[Site], Outcome]] = {
    "kernels": kernels,
    "plugin objects": plugin_objects,
    "plugin outputs": plugin_outputs,
    "onnx": onnx,
    "engine, layer by layer": engine_layers,
    "logits": logits,
}


def why_skipped(name: str, site: Site) -> dict[str, Any] | None:
    reason = GUARDS[name](site) if name in GUARDS else ""
    return {"status": "skipped", "reason": reason} if reason else None


def run(name: str, site: Site) -> dict[str, Any]:
    """A rung's outcome as the report holds it."""
    if skipped := why_skipped(name, site):
        return skipped
    try:
        outcome = RUNGS[name](site)
    except Skipped as e:
        return {"status": "skipped", "reason": str(e)}
    except JetExportError as e:
        return {"status": "failed", "failures": [str(e)]}
    return {"status": "failed" if outcome.failures else "passed", **asdict(outcome)}


def main(name: str, spec: str, result: str) -> int:
    values = json.loads(Path(spec).read_text())
    paths = {k: Path(values[k]) for k in ("bundle", "work", "headers", "text") if values[k] is not None}
    site = Site(**(values | paths))
    Path(result).write_text(json.dumps(run(name, site)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
