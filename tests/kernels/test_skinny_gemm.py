"""jet::skinny_linear, jet::skinny_partials and jet::add_norm: equal to their references, for any number of tokens."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.paged import interpreter_fp8
from helpers.poison import poisoned

from jet_export.kernels import add_norm, configs, skinny_gemm

FP8 = torch.float8_e4m3fn
linear_ref: Any = skinny_gemm.skinny_linear_ref  # called with unpacked tuples, whose lengths types do not tell
linear: Any = skinny_gemm.skinny_linear_triton
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
        got = linear(x, w, *extra, torch.float32)
    exact = linear_ref(x.double(), w.double(), None, None, bias.double(), None, gated, torch.float64)
    assert got.shape == (M, 12 if gated else 24)
    assert no_worse(got, linear_ref(x, w, *extra, torch.float32), exact)


@pytest.mark.parametrize("N, K", SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_sizes_that_are_no_whole_tiles(device, N: int, K: int, biased: bool) -> None:
    x, w, bias = inputs(5, N, K, device)
    extra = (*scales(device), bias if biased else None, None, False)
    with poisoned():
        got = linear(x, w, *extra, torch.float32)
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
def test_add_norm_is_its_reference(device, splits: int, full: bool) -> None:
    """Alone, and with an FP8 layer's scales and a bias before and the next layer's codes behind."""
    M, N = 5, 40
    r = torch.Generator().manual_seed(splits)
    partials, h, norm, bias = (torch.randn(*s, generator=r).to(device) for s in ((splits, M, N), (M, N), (N,), (N,)))
    x_scale, w_scale = scales(device) if full else (None, None)
    extra = (x_scale, w_scale, bias if full else None, h, norm, torch.tensor([0.05], device=device) if full else None)
    with poisoned():
        got_h, got_a = add_norm_triton(partials, *extra, 1e-6)
    want_h, want_a = add_norm_ref(partials, *extra, 1e-6)
    assert relative_error(got_h, want_h) < 1e-6
    if full:
        assert got_a.dtype == FP8 and (got_a.float() != want_a.float()).sum() <= 1
    else:
        assert relative_error(got_a, want_a) < 1e-6


def test_codes_in_and_out_are_the_references(device) -> None:
    """E4M3 on both sides, gated, as gate_up_proj has it; but where a sum lies between two codes."""
    x, w, _ = inputs(6, 32, 64, device)
    extra = (*[s / 8 for s in scales(device)], None, torch.tensor([0.03], device=device), True)
    got = linear(x.to(FP8), w.to(FP8), *extra, torch.float32)
    want = linear_ref(x.to(FP8), w.to(FP8), *extra, torch.float32)
    assert got.dtype == want.dtype == FP8
    assert (got.float() != want.float()).sum() <= 1 and relative_error(got.float(), want.float()) < 0.02


@pytest.mark.parametrize("use", [dict(BN=16, BK=16), dict(BN=32, BK=64)], ids=str)
def test_every_tile_gives_the_same_sums(device, use: dict[str, int]) -> None:
    x, w, _ = inputs(20, 40, 100, device)
    with configs.override("skinny_gemm", {**use, "STAGES": 1, "SPLITS": 1, "num_warps": 4}):
        got = linear(x, w, None, None, None, None, False, torch.float32)
    assert relative_error(got, x.double() @ w.double().t()) < 1e-6


def test_an_fp8_layer_split_and_joined_is_the_layer_and_the_norm() -> None:
    """skinny_partials with add_norm, by the references: what the graph computes without them."""
    x, w, bias = inputs(4, 40, 96, torch.device("cpu"))
    codes, weight, (x_scale, w_scale) = (x / 0.5).to(FP8), (w / 0.25).to(FP8), scales(torch.device("cpu"))
    h, norm = torch.randn(4, 40), torch.rand(40)
    partials = torch.ops.jet.skinny_partials(codes, weight, 3)
    got_h, got_a = torch.ops.jet.add_norm(partials, x_scale, w_scale, bias, h, norm, None, 1e-6)
    y = torch.ops.jet.skinny_linear(codes, weight, x_scale, w_scale, bias, None, False, torch.float32)
    want = h + y
    assert relative_error(got_h, want) < 1e-6
    assert relative_error(got_a, norm * want * torch.rsqrt(want.square().mean(-1, keepdim=True) + 1e-6)) < 1e-6


def test_opcheck() -> None:
    x, w, bias = inputs(4, 24, 96, torch.device("cpu"))
    one = torch.ones(1)
    torch.library.opcheck(torch.ops.jet.skinny_linear, (x, w, one, one, bias, one, True, torch.bfloat16))
    torch.library.opcheck(torch.ops.jet.skinny_partials, (x, w, 3))
    partials = torch.randn(3, 4, 24)
    around = (one, one, bias, x[:, :24].contiguous(), bias)
    torch.library.opcheck(torch.ops.jet.add_norm, (partials, *around, one, 1e-6))


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
                     CODES=gated, PARTIAL=split, MODEL="bf16", GDC=True, PRECISION="tf32", **use)
    kinds = dict(x="*" + kind, weight="*" + kind, x_scale="*fp32", w_scale="*fp32", bias="*bf16", y_scale="*fp32",
                 y="*" + ("fp32" if split else kind), M="i32", N="i32")
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
    assert "bulk.prefetch.L2" in asked and "bulk.prefetch" not in rest and "cp.async.cg" not in asked
print("compiled")
"""


def test_tokens_are_the_narrow_side_of_hoppers_products() -> None:
    """jet-2b's sizes, compiled to SM 9.0: E4M3 and bf16 products 16 tokens wide and more, weights asked for before the
    wait for x, 16-byte loads, no spills."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr[-2000:]


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
    got = torch.ops.jet.skinny_linear(x, w, *extra, torch.bfloat16)
    exact = linear_ref(x.double(), w.double(), *extra, torch.float64)
    assert relative_error(got, exact) < (2**-7 if gated else 2**-8)
    parts = torch.ops.jet.skinny_partials(x, w, skinny_gemm.splits_of(w))
    assert relative_error(parts.sum(0), x.double() @ w.double().t()) < 1e-4
