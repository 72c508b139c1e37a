"""On a GPU: a plugin's outputs and states equal the torch op's, launched by the harness on torch tensors.

The same Triton compiles both, so equality is bit for bit, unless this GPU's cubins have fewer pipeline stages.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.compare import same_bits
from helpers.onnx_models import export

from jet_export.backends.eager import EagerEngine
from jet_export.backends.onnx.evaluate import OnnxModel
from jet_export.ladder.inputs import HOSTILE, RUNS, NodeInputs, random_inputs
from jet_export.ladder.rungs import bound_of, relative
from jet_export.ladder.runs import runs_of
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.plugins.cases import AttentionCase, Case, JetBlockCase
from jet_export.plugins.harness.nodes import PluginNode, plugin_handlers
from jet_export.plugins.harness.objects import Harness
from jet_export.plugins.library import NAME, build_library, library_for
from jet_export.verify.onnx import forced_bound, forced_steps, teacher_forced

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BF16, FP8 = "bfloat16", "float8_e4m3fn"
CASES: list[Case] = [
    JetBlockCase(12, 96, 256, 4, BF16, "float32"),  # jet-2b
    JetBlockCase(16, 128, 256, 4, BF16, "float32"),  # jet-4b
    JetBlockCase(12, 96, 256, 4, BF16, BF16),
    AttentionCase(12, 2, 128, 128, 0, BF16, BF16),
    AttentionCase(12, 2, 128, 128, 1152, BF16, BF16),
    AttentionCase(16, 2, 128, 128, 0, BF16, FP8),
    AttentionCase(16, 2, 128, 128, 2048, BF16, FP8),
    JetBlockCase(12, 96, 256, 4, BF16, "float32", interval=8, rollback=5),
    JetBlockCase(16, 128, 128, 4, BF16, "float32", key_heads=16),  # qwen3.5-2b
    JetBlockCase(32, 128, 128, 4, BF16, "float32", key_heads=16, interval=8, rollback=5),  # qwen3.5-4b
    AttentionCase(16, 4, 256, 128, 0, BF16, BF16, rotary_dim=64, rollback=5),
]
CALLS = [(case, run) for case in CASES for run in runs_of(case, RUNS)]
STREAMS = 4


@pytest.fixture(scope="module")
def plugins(headers, tools):
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        pytest.skip("the cases hold an FP8 cache, which needs SM 8.9")
    folder = build_library(CASES, [major * 10 + minor], headers)
    report = json.loads((folder / "kernels.json").read_text())
    exact = not any(image["fewer_stages"] for kernel in report for image in kernel["images"])
    return Harness(tools[0], folder / NAME), exact


class Call:
    """A plugin object of its own, bound to tensors of its own."""

    def __init__(self, harness: Harness, inputs: NodeInputs, in_place: bool) -> None:
        self.node = PluginNode(harness, inputs.node, inputs.attributes)
        self.inputs = NodeInputs(inputs.case, [t.clone() for t in inputs.tensors], inputs.attributes)
        (dtype, shape), *_ = self.node.output_shapes(self.inputs.tensors)
        o = torch.full(shape, torch.nan, dtype=getattr(torch, dtype), device="cuda")
        states = self.inputs.states()
        self.outputs = [o, *(states if in_place else [torch.empty_like(t).fill_(1) for t in states])]
        self.workspace = self.node.workspace(self.inputs.tensors).fill_(255)  # NaN, in bf16 and fp32

    def __call__(self) -> None:
        self.node.enqueue(self.inputs.tensors, self.outputs, self.workspace)


def check(call: Call, wanted: list[torch.Tensor], exact: bool) -> None:
    torch.cuda.synchronize()
    for i, (got, want) in enumerate(zip(call.outputs, wanted, strict=True)):
        if exact:
            assert same_bits(got, want), (i, relative(got, want))
        assert relative(got, want) <= bound_of(call.inputs.case)


@pytest.mark.parametrize(("case", "run"), CALLS, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_plugin_is_the_op(plugins, case, run, in_place):
    """With separate outputs, states are returned whole: the rows in `slots` updated, the others unchanged."""
    harness, exact = plugins
    lens, context, form = runs_of(case, RUNS)[run]
    inputs = random_inputs(case, lens, context, "cuda", form=form)
    call = Call(harness, inputs, in_place)
    call()
    check(call, inputs.op(), exact)
    kept = list(zip(call.inputs.tensors, inputs.tensors, strict=True))
    if in_place:
        kept = [pair for i, pair in enumerate(kept) if i not in inputs.case.states]
    assert all(same_bits(a, b) for a, b in kept)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_outside_slots_survive(plugins, case):
    harness, _ = plugins
    inputs = random_inputs(case, *RUNS["decode"], "cuda")
    call = Call(harness, inputs, in_place=False)
    call()
    torch.cuda.synchronize()
    for want, before, after in zip(inputs.op()[1:], inputs.states(), call.outputs[1:], strict=True):
        untouched = [i for i in range(len(before)) if same_bits(want[i], before[i])]
        assert untouched and all(same_bits(after[i], before[i]) for i in untouched)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_captured_in_a_graph_and_on_two_streams(plugins, case):
    harness, exact = plugins
    both = [random_inputs(case, *RUNS["decode"], "cuda", seed) for seed in range(2)]
    calls = [Call(harness, inputs, in_place=True) for inputs in both]
    Call(harness, both[0], in_place=True)()  # loads the kernels
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in calls]
    for graph, call in zip(graphs, calls, strict=True):
        with torch.cuda.graph(graph):
            call()
    torch.cuda.synchronize()
    for graph, stream in zip(graphs, (torch.cuda.Stream(), torch.cuda.Stream()), strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
    for call, inputs in zip(calls, both, strict=True):
        check(call, inputs.op(), exact)


def test_captured_by_a_thread_without_a_context(plugins):
    """Its first use of CUDA is the enqueue, during a capture: the stream can be asked for its context even then."""
    harness, exact = plugins
    inputs = random_inputs(CASES[0], *RUNS["decode"], "cuda")
    call = Call(harness, inputs, in_place=True)
    Call(harness, inputs, in_place=True)()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()

    def work(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            call()

    with torch.cuda.graph(graph), ThreadPoolExecutor(1) as pool:
        pool.submit(work, torch.cuda.current_stream()).result()
    graph.replay()
    check(call, inputs.op(), exact)


def test_several_contexts_on_several_threads(plugins):
    """One plugin object per thread and stream, as TensorRT clones one per context; all at once, many times."""
    harness, exact = plugins
    runs = [list(RUNS)[i % len(RUNS)] for i in range(STREAMS)]
    for case in CASES:
        given = [random_inputs(case, *RUNS[run], "cuda", seed) for seed, run in enumerate(runs)]
        wanted = [inputs.op() for inputs in given]
        calls = [Call(harness, inputs, in_place=False) for inputs in given]
        torch.cuda.synchronize()

        def work(call: Call) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    call()

        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(work, calls))
        for call, want in zip(calls, wanted, strict=True):
            check(call, want, exact)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", ["ragged prefill", "decode past the window"])
def test_meaningless_inputs_do_no_harm(plugins, case, run):
    """No fault, and no longer than every sequence claiming all the tokens at the longest context. Under
    compute-sanitizer: benchmarks/kernels/hostile_enqueues.py."""
    harness, exact = plugins
    inputs = random_inputs(case, *RUNS[run], "cuda")
    valid, n = Call(harness, inputs, in_place=True), len(RUNS[run][0])
    valid()
    torch.cuda.synchronize()
    start = time.perf_counter()
    valid()
    torch.cuda.synchronize()
    usual = time.perf_counter() - start
    for seed, kind in enumerate(HOSTILE):
        call = Call(harness, inputs.hostile(kind, seed), in_place=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        assert time.perf_counter() - start < 20 * (n + 1) * usual + 0.05, kind
    again = Call(harness, inputs, in_place=True)  # the process still works
    again()
    check(again, inputs.op(), exact)


@pytest.mark.parametrize("cache", [BF16, FP8])
def test_the_graph_with_plugins_is_the_model(headers, tmp_path, cache):
    """jet-tiny's exported graph, with plugins for its jet nodes: teacher-forced, every value is the model's."""
    major, minor = torch.cuda.get_device_capability()
    from jet_export.bundle.limits import Limits

    limits = Limits(max_batch_size=8, max_seq_len=512, prefill_chunk=256)
    model = JetNemotronForCausalLM.from_pretrained("jet-tiny", torch.bfloat16, torch.device("cuda"), limits.max_seq_len)
    kv = getattr(torch, cache)
    eager = EagerEngine(model, limits, kv_dtype=kv, state_dtype=torch.float32)
    library = library_for(model.config, [10 * major + minor], dtype=BF16, cache_dtype=cache, headers=headers)
    graph = OnnxModel.load(export(model, tmp_path, kv), "cuda", plugin_handlers(library, headers))
    for step in forced_steps(eager, seed=0):
        for m in teacher_forced(graph, eager, step):
            assert m.relative <= forced_bound(eager, m.name), m
