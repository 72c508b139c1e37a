"""On a GPU: a plugin's outputs and states equal the torch op's, launched by the harness on torch tensors.

The same Triton compiles both, so equality is bit for bit, unless this GPU's cubins have fewer pipeline stages."""

import json

import pytest
import torch
from packed import Packed, rel
from paged import make_case, same_bits
from plugin_nodes import fields_of

import jet_export.kernels.attention
import jet_export.kernels.jet_block  # noqa: F401  registers the ops
from jet_export.plugins.cases import AttentionCase, Case, JetBlockCase
from jet_export.plugins.harness.objects import Harness
from jet_export.plugins.library import NAME, build_library

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BF16, FP8 = "bfloat16", "float8_e4m3fn"
CASES: list[Case] = [
    JetBlockCase(12, 96, 256, 4, BF16, "float32"),
    JetBlockCase(16, 128, 256, 4, BF16, "float32"),
    AttentionCase(12, 2, 128, 128, 0, BF16, BF16),
    AttentionCase(16, 2, 128, 128, 300, BF16, BF16),
    AttentionCase(16, 2, 128, 128, 0, BF16, FP8),
]
RUNS = {"prefill": [200], "ragged": [1, 63, 64, 65, 200], "decode": [1] * 5}
STATES = {"JetBlock": [6, 7], "Attention": [2]}


@pytest.fixture(scope="module")
def plugins(headers, tools):
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        pytest.skip("the cases hold an FP8 cache, which needs SM 8.9")
    folder = build_library(CASES, [major * 10 + minor], headers)
    report = json.loads((folder / "kernels.json").read_text())
    exact = not any(image["fewer_stages"] for kernel in report for image in kernel["images"])
    return Harness(tools[0], folder / NAME), exact


def arguments(case: Case, lens: list[int], context: list[int]) -> tuple[list[torch.Tensor], list]:
    """The node's inputs on the GPU, and the op's attributes without `decode`."""
    if isinstance(case, JetBlockCase):
        p = Packed(lens, H=case.num_heads, K=case.head_k_dim, V=case.head_v_dim, dtype=torch.bfloat16, context=context,
                   device="cuda", rows=[-1 if n == 1 else n for n in range(len(lens))], extra=32)  # fmt: skip
        *args, _ = p.block_args(False)
        return list(args[:11]), list(args[11:])
    heads, cache = (case.num_heads, case.num_kv_heads), getattr(torch, case.cache_dtype)
    c = make_case(lens, context, heads, case.head_dim, case.page, torch.bfloat16, cache, window=case.window,
                  k_scale=0.25, v_scale=0.5)  # fmt: skip
    args = c.args("cuda")
    return args[:7], args[7:]


class Call:
    """A plugin with the tensors it is bound to."""

    def __init__(self, harness: Harness, case: Case, tensors: list[torch.Tensor], in_place: bool):
        self.harness, self.node, self.tensors = harness, type(case).__name__.removesuffix("Case"), tensors
        self.plugin = harness.create(self.node, fields_of(case))
        assert self.plugin, harness.messages()
        self.inputs = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors]
        (_, shape), *_ = harness.outputs(self.node, self.plugin, self.inputs)
        self.o = torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")
        held = [tensors[i] for i in STATES[self.node]]
        self.states = held if in_place else [torch.empty_like(t) for t in held]
        size = harness.workspace(self.node, self.plugin, self.inputs)
        self.workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        outputs = [t.data_ptr() for t in (self.o, *self.states)]
        inputs = [t.data_ptr() for t in self.tensors]
        stream = torch.cuda.current_stream().cuda_stream
        status = self.harness.enqueue(
            self.node, self.plugin, self.inputs, inputs, outputs, self.workspace.data_ptr(), stream
        )
        assert status == 0, self.harness.messages()


def run_op(case: Case, tensors: list[torch.Tensor], attributes: list) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tensors = [t.clone() for t in tensors]
    op = torch.ops.jet.jet_block if isinstance(case, JetBlockCase) else torch.ops.jet.attention
    rows = tensors[9] if isinstance(case, JetBlockCase) else tensors[5]
    o = op(*tensors, *attributes, tensors[0].shape[0] == rows.shape[0])
    return o, [tensors[i] for i in STATES[type(case).__name__.removesuffix("Case")]]


def check(call: Call, wanted: tuple[torch.Tensor, list[torch.Tensor]], exact: bool) -> None:
    torch.cuda.synchronize()
    o, states = wanted
    for got, want in zip((call.o, *call.states), (o, *states), strict=True):
        assert same_bits(got, want) if exact else rel(got.float(), want.float()) < 1e-2


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("in_place", [True, False])
def test_plugin_is_the_op(plugins, case, run, in_place):
    harness, exact = plugins
    tensors, attributes = arguments(case, RUNS[run], [7 * n + 400 * (n % 2) for n in range(len(RUNS[run]))])
    wanted = run_op(case, tensors, attributes)
    before = [tensors[i].clone() for i in STATES[type(case).__name__.removesuffix("Case")]]
    call = Call(harness, case, tensors, in_place)
    call()
    check(call, wanted, exact)
    if not in_place:
        assert all(same_bits(tensors[i], b) for i, b in zip(STATES[call.node], before, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_captured_in_a_graph_and_on_two_streams(plugins, case):
    harness, exact = plugins
    pairs = [arguments(case, RUNS["decode"], [9, 130, 64, 0, 300]) for _ in range(2)]
    wanted = [run_op(case, *pair) for pair in pairs]
    fresh = [[t.clone() for t in tensors] for tensors, _ in pairs]
    calls = [Call(harness, case, tensors, in_place=True) for tensors, _ in pairs]
    calls[0]()  # loads the kernels
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in calls]
    for graph, call in zip(graphs, calls, strict=True):
        with torch.cuda.graph(graph):
            call()
    for call, tensors in zip(calls, fresh, strict=True):
        for held, start in zip(call.tensors, tensors, strict=True):
            held.copy_(start)
    torch.cuda.synchronize()
    for graph, stream in zip(graphs, (torch.cuda.Stream(), torch.cuda.Stream()), strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
    for call, want in zip(calls, wanted, strict=True):
        check(call, want, exact)
