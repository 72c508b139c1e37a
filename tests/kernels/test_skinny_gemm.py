"""jet::skinny_linear, jet::skinny_partials and jet::add_norm: equal to their references, for any number of tokens."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.eager_bundle import mini_config
from helpers.fp8_models import to_fp8
from helpers.paged import interpreter_fp8
from helpers.paths import with_helpers
from helpers.poison import poisoned

from jet_export.backends.eager import EagerEngine
from jet_export.backends.inductor.package import export_graph
from jet_export.backends.modes import FEW_ROWS
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.kernels import add_norm, configs, skinny_gemm
from jet_export.model import linear
from jet_export.model.jet_nemotron import random_model
from jet_export.runtime.runner import Runner

FP8 = torch.float8_e4m3fn
linear_ref: Any = skinny_gemm.skinny_linear_ref  # called with unpacked tuples, whose lengths types do not tell
linear_triton: Any = skinny_gemm.skinny_linear_triton
add_norm_ref: Any = add_norm.add_norm_ref
add_norm_triton: Any = add_norm.add_norm_triton
ROWS = [1, 7, 16, 17, 33, 64, 65, 128]  # every width of a tile, full and not
SIZES = [(24, 96), (40, 100), (7, 16)]  # N, K: whole tiles and not


@pytest.fixture(autouse=True)
def fp8_that_rounds(device, monkeypatch) -> None:
    if device.type == "cpu":
        interpreter_fp8(monkeypatch)


def inputs(M: int, N: int, K: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    r = torch.Generator().manual_seed(M + N)
    return tuple(torch.randn(*s, generator=r).to(device) for s in ((M, K), (N, K), (N,)))


def scales(device: torch.device) -> list[torch.Tensor]:
    return [torch.tensor([s], device=device) for s in (0.5, 0.25)]


def no_worse(got: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> bool:
    return relative_error(got, exact) <= relative_error(reference, exact) + 1e-5


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_is_the_reference_for_any_number_of_tokens(device, M: int, gated: bool) -> None:
    x, w, bias = inputs(M, 24, 96, device)
    extra = (None, None, bias, None, gated)
    with poisoned():
        got = linear_triton(x, w, *extra, torch.float32)
    exact = linear_ref(x.double(), w.double(), None, None, bias.double(), None, gated, torch.float64)
    assert got.shape == (M, 12 if gated else 24)
    assert no_worse(got, linear_ref(x, w, *extra, torch.float32), exact)


@pytest.mark.parametrize("N, K", SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_sizes_that_are_no_whole_tiles(device, N: int, K: int, biased: bool) -> None:
    x, w, bias = inputs(5, N, K, device)
    extra = (*scales(device), bias if biased else None, None, False)
    with poisoned():
        got = linear_triton(x, w, *extra, torch.float32)
    exact = linear_ref(x.double(), w.double(), *extra, torch.float64)
    assert no_worse(got, linear_ref(x, w, *extra, torch.float32), exact)


@pytest.mark.parametrize("N, K", SIZES)
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_the_parts_add_up(device, N: int, K: int, splits: int) -> None:
    """Where K is shorter than the parts are many, the last ones are zero."""
    x, w, _ = inputs(9, N, K, device)
    with poisoned():
        got = skinny_gemm.skinny_partials_triton(x, w, splits)
    assert got.shape == (splits, 9, N)
    assert relative_error(got.sum(0), x.double() @ w.double().t()) < 1e-6
    assert relative_error(skinny_gemm.skinny_partials_ref(x, w, splits).sum(0), x.double() @ w.double().t()) < 1e-6


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_add_norm_is_its_reference(device, splits: int, full: bool, values: bool) -> None:
    """Alone, and with an FP8 layer's scales and a bias before and the next layer's codes behind."""
    M, N = 5, 40
    r = torch.Generator().manual_seed(splits)
    partials, h, norm, bias = (torch.randn(*s, generator=r).to(device) for s in ((splits, M, N), (M, N), (N,), (N,)))
    x_scale, w_scale = scales(device) if full else (None, None)
    y_scale, z_weight = (
        (torch.tensor([0.05], device=device), torch.randn(11, N, device=device)) if full else (None, None)
    )
    extra = (x_scale, w_scale, bias if full else None, h, norm, y_scale, z_weight)
    with poisoned():
        got_h, got_a, codes, z = add_norm_triton(partials, *extra, 1e-6, values)
    want_h, want_a, want_codes, want_z = add_norm_ref(partials, *extra, 1e-6, values)
    assert relative_error(got_h, want_h) < 1e-6
    assert got_a.shape == want_a.shape == ((M, N) if values else (0,))
    assert relative_error(got_a, want_a) < 1e-6 if values else True
    assert codes.shape == want_codes.shape == ((M, N) if full else (0,)) and codes.dtype == FP8
    assert z.shape == want_z.shape == ((M, 11) if full else (0,)) and (not full or relative_error(z, want_z) < 1e-6)
    assert (codes.float() != want_codes.float()).sum() <= 1


def test_codes_in_and_out_are_the_references(device) -> None:
    """E4M3 on both sides, gated, as gate_up_proj has it; but where a sum lies between two codes."""
    x, w, _ = inputs(6, 32, 64, device)
    extra = (*[s / 8 for s in scales(device)], None, torch.tensor([0.03], device=device), True)
    got = linear_triton(x.to(FP8), w.to(FP8), *extra, torch.float32)
    want = linear_ref(x.to(FP8), w.to(FP8), *extra, torch.float32)
    assert got.dtype == want.dtype == FP8
    assert (got.float() != want.float()).sum() <= 1 and relative_error(got.float(), want.float()) < 0.02


@pytest.mark.parametrize("use", [dict(BN=16, BK=16), dict(BN=32, BK=64)], ids=str)
def test_every_tile_gives_the_same_sums(device, use: dict[str, int]) -> None:
    x, w, _ = inputs(20, 40, 100, device)
    with configs.override("skinny_gemm", {**use, "STAGES": 1, "SPLITS": 1, "num_warps": 4}):
        got = linear_triton(x, w, None, None, None, None, False, torch.float32)
    assert relative_error(got, x.double() @ w.double().t()) < 1e-6


def test_an_fp8_layer_split_and_joined_is_the_layer_and_the_norm() -> None:
    """skinny_partials with add_norm, by the references: what the graph computes without them."""
    x, w, bias = inputs(4, 40, 96, torch.device("cpu"))
    codes, weight, (x_scale, w_scale) = (x / 0.5).to(FP8), (w / 0.25).to(FP8), scales(torch.device("cpu"))
    h, norm = torch.randn(4, 40), torch.rand(40)
    partials = torch.ops.jet.skinny_partials(codes, weight, 3, [])
    got_h, got_a, *_ = torch.ops.jet.add_norm(partials, x_scale, w_scale, bias, h, norm, None, None, 1e-6, True)
    y = torch.ops.jet.skinny_linear(codes, weight, x_scale, w_scale, bias, None, False, torch.float32, [])
    want = h + y
    assert relative_error(got_h, want) < 1e-6
    assert relative_error(got_a, norm * want * torch.rsqrt(want.square().mean(-1, keepdim=True) + 1e-6)) < 1e-6


def test_opcheck() -> None:
    x, w, bias = inputs(4, 24, 96, torch.device("cpu"))
    one = torch.ones(1)
    torch.library.opcheck(torch.ops.jet.skinny_linear, (x, w, one, one, bias, one, True, torch.bfloat16, [w]))
    torch.library.opcheck(torch.ops.jet.skinny_partials, (x, w, 3, [w]))
    partials = torch.randn(3, 4, 24)
    around = (one, one, bias, x[:, :24].contiguous(), bias)
    torch.library.opcheck(torch.ops.jet.add_norm, (partials, *around, one, w[:, :24].contiguous(), 1e-6, True))


@pytest.mark.parametrize("fp8", [False, True])
def test_the_graph_of_a_few_tokens_is_decode(fp8: bool, monkeypatch) -> None:
    """Three sequences through prefill and three steps. In FP8 [b | a] stays in bf16, so that the norm before it leaves
    values and codes."""
    monkeypatch.setattr(linear, "SKINNY_OUTPUTS", (33, 4096))  # mini is small: all but [b | a]
    model = random_model(mini_config(), torch.float32, max_positions=128)
    if fp8:
        to_fp8(model, torch.randint(model.config.vocab_size, (2, 60)))
    limits = Limits(max_batch_size=4, max_seq_len=128, prefill_chunk=64)
    dtypes = Dtypes(model=torch.float32, kv_cache=torch.float32)
    program = export_graph(model, FEW_ROWS, dtypes, limits)
    targets = [str(n.target) for n in program.graph.nodes]
    layers = len(model.layers)
    assert sum("jet.skinny_partials" in t for t in targets) == sum("jet.add_norm" in t for t in targets) == 2 * layers
    assert sum("jet.skinny_linear" in t for t in targets) >= 2 * layers
    module = program.module()
    runners = [Runner(EagerEngine(model, limits, kv_dtype=torch.float32, state_dtype=torch.float32)) for _ in range(2)]
    for r in runners:
        r.prefill([1, 0, 2], [[5, 6, 7], [8], [9, 10, 11, 12]])
    for token in (3, 5, 7):
        tokens = torch.tensor([token, token + 1, token + 2])
        want = runners[0].decode([1, 0, 2], tokens)
        with torch.no_grad():
            got = module(tokens, *runners[1].batch([1, 0, 2], [1, 1, 1]), None, runners[1].states)
        for slot in range(3):
            runners[1].hold(slot, runners[1].context_lens[slot] + 1)
        assert relative_error(got, want) < (1e-2 if fp8 else 1e-5)  # a code flips where sums differ in the last bit


COMPILE = """
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from jet_export.kernels import configs
from jet_export.kernels.skinny_gemm import skinny_kernel as kernel
names = kernel.arg_names
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
for dtype, N, K, split, gated in ((E4M3, 8960, 1536, False, True), (BF16, 1536, 8960, True, False),
                                  (E4M3, 1536, 3072, True, False)):
    kind = "fp8e4nv" if dtype == E4M3 else "bf16"
    use = configs.lookup("skinny_gemm", dtype=dtype, out_features=2 * N if gated else N, in_features=K, gated=gated,
                         split=split)
    splits, warps = use.pop("SPLITS"), use.pop("num_warps")
    constants = dict(K=K, PART=-(-K // (use["BK"] * splits)) * use["BK"], SCALED=gated, BIASED=False, GATED=gated,
                     CODES=gated, PARTIAL=split, MODEL="bf16", GDC=True, PRECISION="tf32", AHEAD=2**24,
                     AHEAD_MORE=4718592, **use)
    kinds = dict(x="*" + kind, weight="*" + kind, x_scale="*fp32", w_scale="*fp32", bias="*bf16", y_scale="*fp32",
                 ahead="*fp8e4nv", ahead_more="*bf16", y="*" + ("fp32" if split else kind), M="i32", N="i32")
    source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names},
                       {(names.index(n),): v for n, v in constants.items()},
                       {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in kinds and n != "M"})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024 and ".local" not in ptx
    products = set(re.findall(r"mma[.]\\S*[.](m64n\\d+)k\\S+", ptx))
    assert products == {"m64n16", "m64n32", "m64n64", "m64n128"} and "mma.sync" not in ptx, products
    assert "cp.async.cg" in ptx and "cp.async.ca" not in ptx  # 16 bytes at a time
    asked, rest = ptx.split("griddepcontrol.wait")
    assert asked.count("@one cp.async.bulk.prefetch.L2") == 2 < asked.count("bulk.prefetch.L2")
    assert "bulk.prefetch" not in rest and "cp.async.cg" not in asked

# torch sees that nothing but the results is written: for a kernel that it cannot read it takes every argument to be.
from helpers.written_tensors import written_tensors
from jet_export.kernels.add_norm import add_norm_kernel
row = torch.zeros(64, 64, dtype=torch.bfloat16)
joining = dict(eps=1e-6, N=1536, Z=24, BZ=8, SPLITS=6, SCALED=True, BIASED=False, VALUES=True, CODES=True, GDC=True,
               BN=2048)
for kernel, more in ((kernel, constants), (add_norm_kernel, joining)):
    values = {n: more.get(n, 64 if n in "MN" else row) for n in kernel.arg_names}
    print(written_tensors(kernel, values))
"""


def test_tokens_are_the_narrow_side_of_hoppers_products() -> None:
    """jet-2b's sizes, compiled to SM 9.0: E4M3 and bf16 products 16 tokens wide and more, weights asked for before the
    wait for x, 16-byte loads, no spills."""
    env = with_helpers(TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["['y']", "['a', 'codes_out', 'h', 'z']"], done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("M", [2, 16, 40, 128])
@pytest.mark.parametrize("N, K, gated", [(8832, 1536, False), (17920, 1536, True), (1536, 8960, False)])
def test_on_a_gpu_one_rounding_from_the_exact_product(N: int, K: int, gated: bool, M: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch sees none")
    device = torch.device("cuda")
    x, w, _ = inputs(M, N, K, device)
    x, w = (x / 4).to(dtype), (w / 4).to(dtype)
    extra = (*(scales(device) if dtype == FP8 else (None, None)), None, None, gated)
    got = torch.ops.jet.skinny_linear(x, w, *extra, torch.bfloat16, [])
    exact = linear_ref(x.double(), w.double(), *extra, torch.float64)
    assert relative_error(got, exact) < (2**-7 if gated else 2**-8)
    parts = torch.ops.jet.skinny_partials(x, w, skinny_gemm.splits_of(w), [])
    # SM 9.0 sums E4M3 products to 13 bits behind the point, 32 at a time: 1.1e-4 on an H200.
    bound = 2**-12 if dtype == FP8 else 1e-4
    assert relative_error(parts.sum(0), x.double() @ w.double().t()) < bound
