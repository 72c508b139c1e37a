"""jet::linear_chain: equal to its reference and to jet::gemv layer by layer, for every kind of layers in it."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from helpers.compare import relative_error
from helpers.paged import interpreter_fp8
from helpers.paths import with_helpers
from helpers.poison import poisoned

from jet_export.kernels import configs, linear_chain
from jet_export.kernels.gemv import FP8, gemv_ref
from jet_export.kernels.linear_chain import DOWN, GENERATOR, SMALL
from jet_export.kernels.linear_chain_kernel import first_pieces, normed_layer

chain_triton: Any = linear_chain.linear_chain_triton  # called with unpacked tuples, whose lengths types do not tell
chain_ref: Any = linear_chain.linear_chain_ref
TILES = {"programs": 264, "BN": 4, "BK": 16, "AHEAD": 2, "num_warps": 4}


@pytest.fixture(autouse=True)
def fp8_that_rounds(device, monkeypatch) -> None:
    if device.type == "cpu":
        interpreter_fp8(monkeypatch)


def inputs(device, *, layers=6, fp8: tuple[int, ...] = (), biased: tuple[int, ...] = (), D=24, seed=0) -> Any:
    """x, residual, weights, scales, biases and norms of a chain of uneven sizes."""
    r = torch.Generator().manual_seed(seed)
    shapes = [(D, 32), (2 * 20, D), (D, 20), (29, D), (6, D), (13, 9)][:layers]
    weights = [torch.randn(*s, generator=r) / s[1] ** 0.5 for s in shapes]
    weights = [w.to(FP8) if i in fp8 else w for i, w in enumerate(weights)]
    scales = [torch.tensor([0.02 + 0.01 * i]) if i in fp8 else None for i in range(layers)]
    w_scales = [torch.tensor([0.5 + 0.1 * i]) if i in fp8 else None for i in range(layers)]
    biases = [torch.randn(s[0], generator=r) if i in biased else None for i, s in enumerate(shapes)]
    norms = [torch.rand(D, generator=r) + 0.5 for _ in range(2)]
    x, residual = torch.randn(1, 32, generator=r), torch.randn(1, D, generator=r)

    def put(tensors):
        return [None if t is None else t.to(device) for t in tensors]

    return (*put([x, residual]), put(weights), put(scales), put(w_scales), put(biases), put(norms))


def launched(args, tiles: dict[str, int] | None = None, eps=1e-6):
    """The results by the kernel, and the next barrier; what it leaves unwritten is NaN."""
    barrier = torch.zeros(1, dtype=torch.int32, device=args[0].device)
    with configs.override("linear_chain", tiles or TILES), poisoned():
        return chain_triton(*args, barrier, eps)


def wide(args):
    return tuple([None if t is None else t.double() for t in a] if isinstance(a, list) else a.double() for a in args)


@pytest.mark.parametrize("biased", [(), (0, 1, 2, 3, 4, 5)], ids=["plain", "biased"])
@pytest.mark.parametrize("layers", [4, 5, 6])
def test_the_kernel_is_the_reference(device, layers, biased):
    args = inputs(device, layers=layers, biased=tuple(i for i in biased if i < layers))
    *got, barrier = launched(args)
    exact, reference = chain_ref(*wide(args), 1e-6), chain_ref(*args, 1e-6)
    for a, b, c in zip(got, exact, reference, strict=True):
        assert a.shape == b.shape == c.shape
        assert not a.numel() or relative_error(a, b) <= relative_error(c, b) + 1e-6
    assert [t.numel() > 0 for t in got[2:]] == [layers > SMALL, layers > GENERATOR]
    assert barrier.tolist() == [0]


@pytest.mark.parametrize("fp8", [(0, 1, 2, 3, 5), (1, 3), (DOWN,)], ids=str)
def test_layers_in_fp8_are_the_references(device, fp8):
    """A code at the edge between two may round either way, so that a few outputs are off by one code's step."""
    args = inputs(device, fp8=fp8)
    *got, _ = launched(args)
    for a, b in zip(got, chain_ref(*args, 1e-6), strict=True):
        assert relative_error(a, b) < 0.01


@pytest.mark.parametrize("tiles", [dict(BN=2, BK=32, AHEAD=1), dict(BN=8, BK=8, AHEAD=3)], ids=str)
def test_every_tile_gives_the_same_sums(device, tiles):
    args = inputs(device)
    for a, b in zip(launched(args, {**TILES, **tiles})[:4], chain_ref(*wide(args), 1e-6), strict=True):
        assert relative_error(a, b) < 1e-6


@triton.jit
def alone(x, weight, norm, y, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):
    """One layer by all programs of a grid, that it be tried with more than one: they need not wait for each other."""
    i, n = tl.program_id(0), tl.num_programs(0)
    b_w = first_pieces(weight, i, n, N, K, BN, BK, AHEAD)
    normed_layer(
        x, weight, x, x, x, norm, x, y, b_w, b_w, N, 1e-6, i, n, K, tl.float32, True, False, False, False, False,
        False, False, BN, BK, AHEAD,
    )  # fmt: skip


@pytest.mark.parametrize("programs", [1, 3, 9])
@pytest.mark.parametrize("ahead", [1, 5])
def test_programs_share_a_layer(device, programs, ahead):
    """More programs than tiles, and weights asked for beyond a program's last tile."""
    r = torch.Generator().manual_seed(0)
    x, w, norm = (torch.randn(*s, generator=r).to(device) for s in ((1, 24), (29, 24), (24,)))
    y = torch.full((1, 29), float("nan"), device=device)
    alone[(programs,)](x, w, norm, y, 29, K=24, BN=4, BK=16, AHEAD=ahead)
    want = gemv_ref(x, w, None, None, None, norm, None, None, 1e-6, False, False, torch.float32)
    assert relative_error(y, want) < 1e-6


def test_opcheck():
    for layers in (4, 6):
        args = inputs("cpu", layers=layers)
        torch.library.opcheck(torch.ops.jet.linear_chain, (*args, torch.zeros(1, dtype=torch.int32), 1e-6))


COMPILE = """
import json, torch
from helpers import kernel_compiler
from helpers.written_tensors import written_tensors
from jet_export.kernels import common, configs, linear_chain
D, K, M, FP8 = 1536, 3072, 8960, torch.float8_e4m3fn
shapes = [(D, K), (2 * M, D), (D, M), (8832, D), (24, D), (12288, 384)]
weights = [torch.empty(*s, dtype=torch.bfloat16 if s[0] == 24 else FP8) for s in shapes]
scales = [None if s[0] == 24 else torch.ones(1) for s in shapes]
biases = [None] * 5 + [torch.empty(12288, dtype=torch.bfloat16)]
x, h, norm = (torch.empty(*s, dtype=torch.bfloat16) for s in ((1, K), (1, D), (D,)))
kernel_compiler.f64_arithmetic = lambda *_: 0  # a second compilation
compiling = kernel_compiler.compiling_in(linear_chain)
class Reading(kernel_compiler.Compiling):
    def compile(self, *args, **options):
        values = dict(zip(self.kernel.arg_names, args)) | {n: v for n, v in options.items() if n != "num_warps"}
        self.written = written_tensors(self.kernel, values)

reading = Reading()
for wrap in (compiling, reading):
    linear_chain.wrap = wrap
    with configs.use_sm(90), common.dependent_launch(True):
        linear_chain.linear_chain_triton(
            x, h, weights, scales, scales, biases, [norm, norm], torch.zeros(1, dtype=torch.int32), 1e-6
        )
print(json.dumps({**compiling.report[0], "written": reading.written}))
"""


def test_all_programs_fit_sm_90_at_the_same_time():
    """64 K registers a multiprocessor; no spills. torch sees what is written, and no more."""
    env = with_helpers(TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    use = configs.rule_for("linear_chain", 90, dtype="float8_e4m3fn", hidden_size=1536).use
    assert report["registers"] * 32 * use["num_warps"] * -(-use["programs"] // 132) <= 65536
    assert report["stack"] == 0
    assert report["written"] == sorted(["h1", "m", "h2", "y", "z", "k", "barrier", "next_barrier"])
