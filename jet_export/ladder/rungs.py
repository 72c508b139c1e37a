"""What each rung checks. A rung takes a Site and returns figures and failures, or raises Skipped.

    python -m jet_export.ladder.rungs NAME SPEC.json RESULT.json

runs one rung; SPEC.json holds the fields of the Site.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from jet_export.ladder.inputs import RUNS, NodeInputs, attributes_of, node_of, random_inputs
from jet_export.ladder.runs import SMALL_RUNS, node_forms, runs_of, small_cases
from jet_export.ladder.site import Site
from jet_export.plugins.cases import Case, label
from jet_export.utils.errors import JetExportError


class Skipped(Exception):
    """Raised with the reason where a rung cannot run here. Such a rung has not passed."""


@dataclass
class Outcome:
    """The results of a rung that ran."""

    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def compare(self, what: str, got: list[torch.Tensor], want: list[torch.Tensor], bound: float) -> None:
        """Add the largest relative error of the output and the states."""
        error = max((relative(a, b) for a, b in zip(got, want, strict=True)), key=lambda e: (e != e, e))
        self.figures[what] = error
        if not error <= bound:
            self.failures.append(f"{what}: relative error {error:.3g}, bound {bound:.3g}")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b|| in fp64."""
    a, b = a.cpu().double(), b.cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def bound_of(case: Case) -> float:
    """The largest relative error. 16 bits: both operands of a product and its result are rounded. fp32: sums are in
    another order."""
    return 1e-5 if case.dtype == "float32" else 3 * torch.finfo(getattr(torch, case.dtype)).eps / 2


def kernels(site: Site) -> Outcome:
    """Triton kernels against their references: of the model's own sizes on a GPU, of small ones without."""
    from jet_export.kernels.common import INTERPRET

    interpreted = site.device.type == "cpu"
    if interpreted and not INTERPRET:
        raise Skipped("no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)")
    out = Outcome({"kernels": "Triton's interpreter, small sizes in fp32" if interpreted else "this GPU's"})
    for case in small_cases(site) if interpreted else site.cases:
        for run, (lens, context, form) in runs_of(case, SMALL_RUNS if interpreted else RUNS).items():
            inputs = random_inputs(case, lens, context, site.device, site.seed, form)
            got = launch_interpreted(inputs) if interpreted else inputs.op()
            out.compare(f"{label(case)}: {run}", got, inputs.reference(), bound_of(case))
    return out


def launch_interpreted(inputs: NodeInputs) -> list[torch.Tensor]:
    """The kernels that the op launches on a GPU, in the interpreter; on a CPU the op runs its reference."""
    from jet_export.kernels.attention import attention_triton
    from jet_export.kernels.jet_block import jet_block_triton

    launcher: Callable[..., torch.Tensor] = jet_block_triton if inputs.node == "JetBlock" else attention_triton
    return inputs.results_of(launcher, [t.clone() for t in inputs.tensors])


def harness_of(site: Site) -> tuple[Any, Path]:
    """The C harness of the plugin library, and that library's directory."""
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
    """Plugin objects, for which no GPU is needed: created from the model's attributes, serialised and read back, asked
    for shapes, formats and workspace. Invalid requests must be refused."""
    from jet_export.plugins.harness.nodes import described

    harness, _ = harness_of(site)
    out = Outcome()

    def expect(case: Case, what: str, ok: bool) -> None:
        if not ok:
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
            expect(case, "read back, it answers differently", same and harness.workspace(node, again, inputs) == size)
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
    """Plugins enqueued on this GPU against the torch ops, with states updated in place and not, and in a CUDA graph."""
    from jet_export.plugins.harness.nodes import PluginNode

    harness, folder = harness_of(site)
    out = Outcome({"library": "the bundle's" if folder == site.bundle else "built now"})
    for case in site.cases:
        nodes = {form: PluginNode(harness, node_of(case), attributes_of(case, form)) for form in node_forms(case)}
        for run, (lens, context, form) in runs_of(case, RUNS).items():
            inputs, node = random_inputs(case, lens, context, site.device, site.seed, form), nodes[form]
            want, bound, what = inputs.op(), bound_of(case), f"{label(case)}: {run}"
            out.compare(f"{what}, states apart", list(node(*inputs.tensors)), want, bound)
            out.compare(f"{what}, in place", enqueue_in_place(node, inputs, graph=False), want, bound)
            if run in ("decode", "drafts"):
                out.compare(f"{what}, CUDA graph", enqueue_in_place(node, inputs, graph=True), want, bound)
        for node in nodes.values():
            node.close()
    return out


def enqueue_in_place(node: Any, inputs: NodeInputs, *, graph: bool) -> list[torch.Tensor]:
    """The output and the states of a plugin that updates its states in place. `graph`: in a CUDA graph."""
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
    """The ONNX graph against the model: every node on the model's own inputs, then end to end; on a GPU also every node
    with the plugins in place of the torch ops."""
    from jet_export.backends.onnx.engine import OnnxEngine
    from jet_export.backends.onnx.evaluate import OnnxModel
    from jet_export.backends.onnx.export import VERIFY_GRAPH
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
        drafts = graph.with_name(VERIFY_GRAPH) if site.eager.rollback else None
        both = [OnnxModel.load(g, site.eager.device, handlers) if g else None for g in (graph, drafts)]
        assert both[0] is not None
        return OnnxEngine.like(site.eager, both[0], both[1])

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
    """The result of `jet-export verify`, which runs once for the two rungs that read it."""
    from jet_export.backends.load import check_bundle
    from jet_export.verify.verify import verify_bundle

    path = site.work / "verification.json"
    if not path.is_file():
        check_bundle(site.bundle, site.manifest)
        result = verify_bundle(site.bundle, site.text, site.seed, print)
        path.write_text(json.dumps(result.to_dict()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def is_logits(failure: str) -> bool:
    """Whether a failure that verify reports is in the engine's output, not in a layer's state."""
    return ": logits: " in failure or failure.startswith(("held-out", "bits per byte", "decode by CUDA graph"))


def engine_layers(site: Site) -> Outcome:
    """The built engine against the model: every layer's states after every step."""
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
    """The built engine's logits against the model's, and its quality on held-out text."""
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


# Why a rung cannot run here, as far as that is known before anything heavy is imported; "" where it may run.
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
    """Run a rung. Returns its entry in the report."""
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
