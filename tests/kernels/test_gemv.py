"""jet::gemv: equal to its reference, whatever its tiles; one linear layer, and a whole decode step, by it."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import relative_error
from helpers.golden import DATA, MINI_NAMES, load_golden
from helpers.paged import interpreter_fp8
from helpers.paths import with_helpers
from helpers.poison import poisoned

from jet_export.backends.eager import EagerEngine
from jet_export.backends.inductor.package import export_graph
from jet_export.backends.modes import ONE_ROW
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.kernels import configs, gemv
from jet_export.model.fp8 import Fp8Linear
from jet_export.model.linear import project
from jet_export.model.mode import graph_mode
from jet_export.runtime.runner import Runner

FP8 = torch.float8_e4m3fn
gemv_ref: Any = gemv.gemv_ref  # called with unpacked tuples, whose lengths types do not tell
gemv_triton: Any = gemv.gemv_triton


@pytest.fixture(autouse=True)
def fp8_that_rounds(device, monkeypatch) -> None:
    if device.type == "cpu":
        interpreter_fp8(monkeypatch)


SHAPES = [(24, 96), (40, 1000), (7, 16), (129, 520)]  # N, K: whole tiles and not


def inputs(N, K, dtype=torch.float32, device="cpu"):
    r = torch.Generator().manual_seed(N)
    x, w, bias = (torch.randn(*s, generator=r) for s in ((1, K), (N, K), (N,)))
    scales = [torch.tensor([s], device=device) for s in (0.5, 0.25)]
    return x.to(dtype).to(device), w.to(dtype).to(device), scales, bias.to(device)


ALONE: Any = (None, None, None, 0.0, False, False)  # a linear layer with nothing around it


def launched(x, w, x_scale, w_scale, bias, dtype, around: Any = ALONE):
    """y by the kernel; what it leaves unwritten is NaN."""
    with poisoned():
        return gemv_triton(x, w, x_scale, w_scale, bias, *around, dtype)


@pytest.mark.parametrize("N, K", SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_kernel_is_reference(device, N, K, scaled, biased):
    """With scales x is in E4M3; W may have any dtype."""
    x, w, scales, bias = inputs(N, K, device=device)
    x = x.to(FP8) if scaled else x
    x_scale, w_scale = scales if scaled else (None, None)
    extra = (x_scale, w_scale, bias if biased else None)
    got = launched(x, w, *extra, torch.float32)
    exact = gemv_ref(x.double(), w.double(), *extra, *ALONE, torch.float64)
    assert relative_error(got, exact) <= relative_error(gemv_ref(x, w, *extra, *ALONE, torch.float32), exact) + 1e-5


@pytest.mark.parametrize("N, K", [(12, 200)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_with_what_stands_around_it_the_kernel_is_the_reference(device, N, K, normed, silu, gated, added):
    x, w, _, bias = inputs(N, K, device=device)
    outputs = N // 2 if gated else N
    norm_weight, residual = 0.5 + w[0].abs(), bias[None, :outputs] * 3
    around = (norm_weight if normed else None, residual if added else None, None, 1e-6, silu, gated)
    got = launched(x, w, None, None, bias, torch.float32, around)
    wide: Any = [t.double() if isinstance(t, torch.Tensor) else t for t in around]
    exact = gemv_ref(x.double(), w.double(), None, None, bias.double(), *wide, torch.float64)
    reference = gemv_ref(x, w, None, None, bias, *around, torch.float32)
    assert got.shape == (1, outputs)
    assert relative_error(got, exact) <= relative_error(reference, exact) + 1e-5


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_codes_in_and_out_are_the_references(device, normed, gated):
    """x is quantised on the way in, y on the way out: the same E4M3 codes, but where a sum lies between two of them."""
    x, w, scales, _ = inputs(64, 96, device=device)
    w, (x_scale, w_scale) = w.to(FP8), [s / 16 for s in scales]
    around = (w[0].float() if normed else None, None, torch.tensor([0.03], device=device), 1e-6, False, gated)
    got = launched(x, w, x_scale, w_scale, None, torch.float32, around)
    want = gemv_ref(x, w, x_scale, w_scale, None, *around, torch.float32)
    assert got.dtype == want.dtype == FP8
    assert (got.float() != want.float()).sum() <= 1 and relative_error(got.float(), want.float()) < 0.02


def test_numbers_beyond_e4m3_saturate_and_nan_stays(device):
    x = torch.tensor([[1e6, -1e6, 1.0, 1.0]], device=device)
    w, one = torch.eye(4, device=device).to(FP8), torch.ones(1, device=device)
    assert launched(x, w, one, one, None, torch.float32).tolist() == [[448, -448, 1, 1]]
    x[0, 2] = float("nan")
    if device.type == "cpu":
        return  # the interpreter reads the code of NaN as 480
    assert launched(x, w, one, one, None, torch.float32).isnan().all()  # as in any product


@pytest.mark.parametrize("use", [dict(BN=1, BK=64), dict(BN=16, BK=256), dict(BN=2, BK=2048)], ids=str)
def test_every_tile_gives_the_same_sums(device, use):
    x, w, *_ = inputs(40, 520, device=device)
    with configs.override("gemv", {**use, "STAGES": 1, "num_warps": 4}):
        assert relative_error(launched(x, w, None, None, None, torch.float32), x.double() @ w.double().t()) < 1e-6


def test_opcheck():
    x, w, scales, bias = inputs(24, 96)
    for extra in ((None, None, None), (*scales, bias)):
        torch.library.opcheck(torch.ops.jet.gemv, (x, w.t().contiguous().t(), *extra, *ALONE, torch.bfloat16, [w]))
    around = (w[0], bias[None, :12].bfloat16(), scales[0], 1e-6, True, True)
    torch.library.opcheck(torch.ops.jet.gemv, (x.bfloat16(), w, *scales, bias, *around, torch.bfloat16, []))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_layer_in_the_graph_of_one_token_is_the_layer(dtype, fused):
    linear = torch.nn.Linear(96, 48).to(dtype).requires_grad_(False)
    layer = Fp8Linear.from_linear(linear, 0.01, 0.02)
    x = torch.randn(1, 96).to(dtype)
    with graph_mode("inductor", "fused" if fused else "gemv"):
        got = project(layer, x)
    assert got.dtype == dtype and relative_error(got, layer(x)) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [n for n in MINI_NAMES if "float32" in n])
def test_the_graph_of_one_token_is_decode(name, fused, tmp_path):
    golden = load_golden(DATA / name)
    model = golden.model(tmp_path)
    limits = Limits(max_batch_size=2, max_seq_len=128, prefill_chunk=64)
    program = export_graph(model, ONE_ROW, Dtypes(model=torch.float32, kv_cache=torch.float32), limits, fused)
    assert sum("gemv" in str(n.target) for n in program.graph.nodes) >= 4 * len(model.layers) + 1
    module = program.module()
    runners = [Runner(EagerEngine(model, limits, kv_dtype=torch.float32, state_dtype=torch.float32)) for _ in range(2)]
    ids = golden.input_ids[0, :20].tolist()
    for r in runners:
        r.prefill([1], [ids])
    for token in (3, 5, 7):
        tokens = torch.tensor([token])
        want = runners[0].decode([1], tokens)
        with torch.no_grad():
            got = module(tokens, *runners[1].batch([1], [1]), None, runners[1].states)
        runners[1].hold(1, runners[1].context_lens[1] + 1)
        assert relative_error(got, want) < 1e-5
        states = zip(runners[1].states, runners[0].states, strict=True)
        assert all(relative_error(a, b) < 1e-5 for a, b in states if b.any())


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from jet_export.kernels import configs
from jet_export.kernels.gemv import gemv_kernel as kernel
IN, ADDED, ACTIVATED = dict(NORM=True), dict(RESIDUAL=True), dict(SILU=True)
UP = dict(NORM=True, GATED=True)
for kind, dtype in (("fp8e4nv", "float8_e4m3fn"), ("bf16", "bfloat16")):
    fp8 = dtype == "float8_e4m3fn"
    for N, K, around in ((8832, 1536, IN), (24, 1536, IN), (12288, 384, ACTIVATED), (1536, 3072, ADDED),
                         (17920, 1536, UP), (1536, 8960, ADDED), (151936, 1536, {})):
        if (N, fp8) == (24, True):
            continue  # [b | a] stays in bf16
        flags = {f: False for f in ("NORM", "SILU", "GATED", "RESIDUAL")} | around
        facts = dict(out_features=N, in_features=K, normed=flags["NORM"], gated=flags["GATED"])
        use = configs.lookup("gemv", dtype=getattr(torch, dtype), **facts)
        codes_in = fp8 and K == 8960
        if flags["NORM"]:
            use["BK"] = triton.next_power_of_2(K)
        codes_out = fp8 and N == 17920
        constants = dict(K=K, GDC=False, AHEAD=0, AHEAD_MORE=0,
                         QUANTISE=fp8 and not codes_in, SCALED=fp8, BIASED=N == 12288, CODES=codes_out,
                         BN=use["BN"], BK=use["BK"], STAGES=use["STAGES"], **flags)
        kinds = {"x": "*" + (kind if codes_in else "bf16"), "weight": "*" + kind, "x_scale": "*fp32",
                 "w_scale": "*fp32", "bias": "*bf16", "norm_weight": "*bf16", "residual": "*bf16", "y_scale": "*fp32",
                 "ahead": "*fp8e4nv", "ahead_more": "*bf16",
                 "y": "*" + (kind if codes_out else "bf16"), "N": "i32", "eps": "fp32"}
        names = kernel.arg_names
        source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                           {(names.index(n),): v for n, v in constants.items()},
                           {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in kinds and n != "eps"})
        options = {"num_warps": use["num_warps"]}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert ".v4." in ptx or "cp.async.cg" in ptx, (kind, N, K)  # weights come 16 bytes at a time
        assert ".local" not in ptx
print("compiled")

# With programmatic dependent launch the weights are on their way before the wait, and what is asked for ahead, x is
# read behind it, and torch
# still sees that nothing but y is written: for a kernel that it cannot read it takes every argument to be.
constants |= dict(K=1536, NORM=True, QUANTISE=False, SCALED=False, BIASED=False, RESIDUAL=True, GDC=True, AHEAD=2**24,
                  AHEAD_MORE=4718592, BN=8, BK=2048)
source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                   {(names.index(n),): v for n, v in constants.items()},
                   {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in kinds and n != "eps"})
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
weights, reads = ptx.split("griddepcontrol.wait")
assert weights.count("bulk.prefetch.L2") == 2 and "prefetch" not in reads
assert weights.count("ld.global") >= 8 and "st.global" not in weights and "ld.global.v4" in reads
from helpers.written_tensors import written_tensors
row = torch.zeros(1, 1536, dtype=torch.bfloat16)
values = {n: row if kind.startswith("*") else 64 for n, kind in kinds.items()} | {"eps": 1e-6} | constants
print(written_tensors(kernel, values))
"""


def test_every_size_of_jet_2b_compiles_with_wide_loads(tmp_path):
    (tmp_path / "compile.py").write_text(COMPILE)
    env = with_helpers(TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, str(tmp_path / "compile.py")], env=env, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["compiled", "['y']"], done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("N, K", [(8832, 1536), (12288, 384), (1536, 8960), (24, 1536)])
def test_on_a_gpu_one_rounding_from_the_exact_product(N, K, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch sees none")
    """A layer in E4M3 whose x is in E4M3, and one in bf16."""
    x, w, scales, bias = inputs(N, K, dtype, "cuda")
    scales, factor = (scales, 0.125) if dtype == FP8 else ([None, None], 1.0)
    got = torch.ops.jet.gemv(x, w, *scales, bias.bfloat16(), *ALONE, torch.bfloat16, [])
    exact = F.linear(x.double(), w.double()) * factor + bias.bfloat16().double()
    assert relative_error(got, exact) < 2**-8
