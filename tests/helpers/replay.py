"""A GPU made of Triton's interpreter: runs on the CPU what the plugins launched on the recording driver.

python replay.py JOB.json        with TRITON_INTERPRET=1; run_job() does that

The launches of a plugin arrive as a cubin's hash, a grid and argument bytes, addresses among them. The table beside the
library says which kernel in which configuration a cubin is; its Python function is run over that grid at those
addresses. What is wrong in the plugin's arguments, strides, workspace or copies is then wrong in the result.
"""

import ctypes
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(1, str(Path(__file__).parents[1]))  # tests, for helpers
from helpers.compare import relative_error
from helpers.interpreter import patch_interpreter
from helpers.paths import with_helpers
from helpers.plugin_harness import FakeGpu, image_hash
from jet_export.plugins.cases import ATTENTION_MODULES, JET_BLOCK_MODULES

DTYPES = {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*i32": torch.int32, "*fp8e4nv": torch.float8_e4m3fn}


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What this program prints for the job."""
    (folder / "job.json").write_text(json.dumps(job))
    env = with_helpers(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, __file__, str(folder / "job.json")]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    printed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return printed


def tensor_at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """One element there: the interpreter asks a tensor for its address and dtype alone."""
    room = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(room, dtype=torch.uint8).view(dtype)


def value_of(kind: str, bits: int) -> Any:
    if kind.startswith("*"):
        return tensor_at(bits, DTYPES[kind])
    packed = struct.pack("<I", bits & 0xFFFFFFFF)
    return struct.unpack("<f" if kind == "fp32" else "<i", packed)[0]


TOKENS = 3  # of the steps that faults are seeded in


class Replay:
    def __init__(self, folder: Path, fake: Path, sm: int) -> None:
        self.kernels = json.loads((folder / "kernels.json").read_text())
        self.images = {image_hash((folder / f"{i}_{sm}.cubin").read_bytes()): k for i, k in enumerate(self.kernels)}
        self.gpu = FakeGpu(fake, self.kernels)
        self.gpu.c.fake_device(sm // 10, sm % 10, 132)
        self.count = 0
        self.fault = ""  # see spoil
        self.stale = torch.full((64,), 3, dtype=torch.int32)

    def __call__(self) -> None:
        """Run what was launched since the last call, in order."""
        for launch in self.gpu.take():
            self.count += 1
            if launch["name"] == "memcpy":
                ctypes.memmove(*launch["args"])
            else:
                self.run(self.images[launch["image"]], launch)

    def spoil(self, kernel: str, given: dict[str, Any]) -> None:
        """Seeded faults of a launch."""
        for name in ("stride_t", "stride_kappa"):
            if self.fault == "transposed stride" and name in given:
                given[name] = TOKENS  # a row's stride where the tensor lies the other way round
        if self.fault == "wrong FP8 scale" and "s2" in given:
            given["s2"] *= 1.05  # it holds k_scale
        if self.fault == "stale context_lens" and "context_lens" in given:
            given["context_lens"] = self.stale

    def run(self, kernel: dict, launch: dict) -> None:
        found = (getattr(m, kernel["name"], None) for m in (*JET_BLOCK_MODULES, *ATTENTION_MODULES))
        function = next(f for f in found if f is not None)
        dynamic = [(name, kind) for name, kind in kernel["signature"] if kind != "constexpr"]
        assert launch["args"][len(dynamic) :] == [0, 0]
        given = {name: value_of(kind, bits) for (name, kind), bits in zip(dynamic, launch["args"], strict=False)}
        if self.fault:
            self.spoil(kernel["name"], given)
        constants = dict(kernel["constexprs"])
        if "ASK" in constants:
            constants["ASK"] = 0  # a hint to L2 in PTX, which the interpreter has not
        function[tuple(launch["grid"])](**given, **constants)


def evaluate(job: dict) -> dict:
    """Teacher-forced errors and the end-to-end error of graphs whose jet:: nodes are the plugins."""
    from jet_export.backends.eager import EagerEngine
    from jet_export.backends.graph import feeds
    from jet_export.backends.onnx.evaluate import OnnxModel
    from jet_export.backends.onnx.export import VERIFY_GRAPH
    from jet_export.bundle.limits import Limits
    from jet_export.kernels.form import Form
    from jet_export.model.config import JetNemotronConfig
    from jet_export.model.jet_nemotron import random_model
    from jet_export.plugins.harness.nodes import plugin_handlers
    from jet_export.verify.onnx import forced_steps, teacher_forced

    limits = Limits(max_batch_size=8, max_seq_len=256, prefill_chunk=64)
    model = random_model(JetNemotronConfig.from_json_file(job["config"]), torch.float32, "cpu", 0, limits.max_seq_len)
    interval, rollback = job.get("interval", 1), job.get("rollback", 0)
    eager = EagerEngine(model, limits, kv_dtype=torch.float32, state_interval=interval, rollback=rollback)
    replay = Replay(Path(job["folder"]), Path(job["fake"]), job["sm"])
    handlers = plugin_handlers(job["folder"], job["headers"], replay)
    graph = OnnxModel.load(job["graph"], "cpu", handlers)
    drafts = OnnxModel.load(Path(job["graph"]).with_name(VERIFY_GRAPH), "cpu", handlers) if rollback else graph
    plain = OnnxModel.load(job["graph"])
    nodes: list[dict] = []
    whole: list[float] = []
    for step in forced_steps(eager, seed=1):
        found = teacher_forced(drafts if step.form is Form.VERIFY else graph, eager, step)
        nodes.append({m.name: m.relative for m in found})
        if not step.decode:
            continue  # end to end a decode step, whose states are any prefill's; interpreting takes its time
        given = feeds([s.name for s in eager.specs], *step[:4])
        ours, theirs = graph.run(given), plain.run(given)
        whole += [relative_error(ours[n], theirs[n]) for n in ours]
    return {"nodes": nodes, "end_to_end": max(whole), "launches": replay.count}


def enqueued(job: dict) -> dict:
    """Plugins against their references, states apart and in place, and what hostile inputs make them touch."""
    from helpers.checked_memory import checked_memory
    from jet_export.ladder.inputs import attributes_of, node_of, random_inputs
    from jet_export.ladder.rungs import relative
    from jet_export.ladder.runs import runs_of
    from jet_export.plugins.cases import case_from_dict, label
    from jet_export.plugins.harness.build import harness_library
    from jet_export.plugins.harness.nodes import PluginNode
    from jet_export.plugins.harness.objects import Harness
    from jet_export.plugins.library import NAME

    folder = Path(job["folder"])
    replay = Replay(folder, Path(job["fake"]), job["sm"])
    harness = Harness(harness_library(job["headers"]), folder / NAME)
    out: dict[str, Any] = {"errors": {}, "lost": [], "hostile": 0}
    for case in map(case_from_dict, job["cases"]):
        for run, (lens, context, form) in runs_of(case, job["runs"]).items():
            node = PluginNode(harness, node_of(case), attributes_of(case, form), replay)
            inputs = random_inputs(case, lens, context, "cpu", form=form)
            want, before = inputs.reference(), [t.clone() for t in inputs.tensors]
            o, *states = node(*inputs.tensors)
            what = f"{label(case)}: {run}"
            out["errors"][f"{what}: apart"] = max(map(relative, (o, *states), want))
            if not all(torch.equal(a, b) for a, b in zip(inputs.tensors, before, strict=True)):
                out["lost"].append(f"{what}: an input changed")
            for state, old, new in zip(states, inputs.states(), want[1:], strict=True):
                kept = (old == new).flatten(1).all(1)  # rows that the reference leaves as they were
                if not kept.any() or not torch.equal(state[kept], old[kept]):
                    out["lost"].append(f"{what}: rows outside the slots")
            tensors = inputs.tensors
            node.enqueue(tensors, [o.fill_(torch.nan), *inputs.states()])
            out["errors"][f"{what}: in place"] = max(map(relative, (o, *inputs.states()), want))
            for seed, kind in enumerate(job["kinds"]):
                held = random_inputs(case, lens, context, "cpu", form=form).hostile(kind, seed)
                workspace = node.workspace(held.tensors)
                with checked_memory([*held.tensors, o, workspace]):
                    node.enqueue(held.tensors, [o, *held.states()], workspace)
                out["hostile"] += 1
            node.close()
    return out


def faulty(job: dict) -> dict:
    """The largest error of each node under each fault; of cases that have it, in the form VERIFY."""
    from jet_export.kernels.form import Form
    from jet_export.ladder.inputs import attributes_of, node_of, random_inputs
    from jet_export.ladder.rungs import relative
    from jet_export.plugins.cases import case_from_dict
    from jet_export.plugins.harness.build import harness_library
    from jet_export.plugins.harness.nodes import PluginNode
    from jet_export.plugins.harness.objects import Harness
    from jet_export.plugins.library import NAME

    folder = Path(job["folder"])
    replay = Replay(folder, Path(job["fake"]), job["sm"])
    harness = Harness(harness_library(job["headers"]), folder / NAME)
    out: dict[str, dict[str, float]] = {}
    for fault in ("", *job["faults"]):
        for case in map(case_from_dict, job.get("faulty cases", job["cases"])):
            form = Form.VERIFY if case.rollback else Form.MIXED
            inputs = random_inputs(case, [1] * TOKENS, [9, 30, 0], "cpu", form=form)
            replay.fault = fault
            node = PluginNode(harness, node_of(case), attributes_of(case, form), replay)
            tensors = list(inputs.tensors)
            if fault == "missing reformat":  # the memory of the other layout, taken as it lies
                tensors[0] = tensors[0].t().contiguous().view(tensors[0].shape)
            if fault == "swapped state binding":
                i = case.states[-1] if inputs.node == "JetBlock" else 2
                tensors[i] = tensors[i].flip(0)
            errors = map(relative, node(*tensors), inputs.reference())
            found = out.setdefault(fault, {})
            found[inputs.node] = max([found.get(inputs.node, 0.0), *(1e9 if e != e else e for e in errors)])
    return out


if __name__ == "__main__":
    patch_interpreter()
    job = json.loads(Path(sys.argv[1]).read_text())
    found = evaluate(job) if "graph" in job else enqueued(job) if "runs" in job else {}
    if "faults" in job:
        found["faults"] = faulty(job)
    print(json.dumps(found))
