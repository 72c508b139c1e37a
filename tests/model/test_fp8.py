"""Fp8Linear equals its definition: static E4M3 codes, fp32 sums, one cast; compiled or not."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from jet_export.model.fp8 import FP8, Fp8Linear, widen
from jet_export.model.mode import Linears, graph_mode

TOKENS = [1, 2, 63, 64, 65, 200]
DTYPES = [torch.bfloat16, torch.float32]


def make(K: int, N: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> tuple[nn.Linear, Fp8Linear]:
    torch.manual_seed(seed)
    linear = nn.Linear(K, N, bias=bias).to(dtype).requires_grad_(False)
    amax = float(linear.weight.abs().max())
    return linear, Fp8Linear.from_linear(linear, weight_scale=amax / 448, input_scale=4.1 / 448)


def e4m3_value(code: int) -> float:
    """The number that an 8-bit code stands for, by the format's definition."""
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


E4M3 = torch.tensor([e4m3_value(c) for c in range(256)], dtype=torch.float64)


def nearest_e4m3(x: Tensor) -> Tensor:
    """fp64 -> the nearest E4M3 number within +-448 (ties to the even code), in fp64."""
    magnitude = E4M3[:127]  # ascending, 0 to 448
    a = x.abs().clamp(max=448.0)
    high = torch.searchsorted(magnitude, a).clamp(max=126)
    low = (high - 1).clamp(min=0)
    down, up = a - magnitude[low], magnitude[high] - a
    code = torch.where((down < up) | ((down == up) & (low % 2 == 0)), low, high)
    return magnitude[code] * x.sign()


def reference(layer: Fp8Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """y in fp64 from the layer's buffers, and the bound (K + 3) eps sum |products| on the rounding in fp32."""
    q = nearest_e4m3((x.float() / layer.input_scale).double())
    w = E4M3[layer.weight.view(torch.uint8).long()]
    scale = layer.input_scale.double() * layer.weight_scale.double()
    bias = torch.zeros(()).double() if layer.bias is None else layer.bias.double()
    eps = torch.finfo(torch.float32).eps
    size = q.abs() @ w.abs().t() * scale + bias.abs()
    return q @ w.t() * scale + bias, (layer.in_features + 3) * eps * size


def assert_within_rounding(y: Tensor, layer: Fp8Linear, x: Tensor) -> None:
    expected, bound = reference(layer, x)
    bound = bound + torch.finfo(x.dtype).eps / 2 * (expected.abs() + bound)  # the last cast
    assert y.dtype == x.dtype
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_explicit_arithmetic(dtype: torch.dtype, bias: bool) -> None:
    _, layer = make(96, 48, bias, dtype)
    for T in TOKENS:
        x = (torch.randn(T, 96) * 1.5).to(dtype)  # a few values lie beyond 4.1
        assert_within_rounding(layer(x), layer, x)


def test_weight_codes_are_the_nearest() -> None:
    linear, layer = make(96, 48, False, torch.float32)
    expected = nearest_e4m3((linear.weight / layer.weight_scale).double())
    assert torch.equal(E4M3[layer.weight.view(torch.uint8).long()], expected)
    assert layer.weight.dtype == FP8 and widen(layer.weight).abs().max() == 448


def test_large_weights_are_quantised_by_rows() -> None:
    linear = nn.Linear(16, 4096 + 16, bias=False)
    layer = Fp8Linear.from_linear(linear, 1e-3, 1.0)
    expected = (linear.weight / layer.weight_scale).clamp(-448, 448).to(FP8)
    assert torch.equal(layer.weight.view(torch.uint8), expected.view(torch.uint8))


def test_widen_is_exact_for_every_code() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    assert torch.equal(widen(codes.view(FP8)).double(), E4M3[codes.long()])
    assert torch.equal(widen(codes.view(FP8)), codes.view(FP8).float())


@pytest.mark.parametrize("value", [4.1, 5.0, 1e4, math.inf])
def test_values_beyond_the_scale_saturate(value: float) -> None:
    _, layer = make(32, 16, True, torch.bfloat16)
    limit = layer(torch.full((1, 32), 4.1, dtype=torch.bfloat16))
    assert torch.equal(layer(torch.full((1, 32), value, dtype=torch.bfloat16)), limit)
    assert torch.isfinite(layer(torch.full((3, 32), -value, dtype=torch.bfloat16))).all()


def test_nan_stays_nan() -> None:
    _, layer = make(32, 16, True, torch.bfloat16)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    x[1, 5] = math.nan
    y = layer(x)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_the_scale_is_static() -> None:
    """A large token does not change its neighbours, and small inputs are rounded by the fixed scale."""
    _, layer = make(32, 16, False, torch.float32)
    x = torch.randn(4, 32)
    loud = x.clone()
    loud[0] *= 1000
    assert torch.equal(layer(x)[1:], layer(loud)[1:])
    smallest = float(layer.input_scale) * 2.0**-9
    assert (layer(torch.full((1, 32), smallest * 0.49)) == 0).all()
    assert torch.equal(layer(torch.full((1, 32), smallest * 0.51)), layer(torch.full((1, 32), smallest)))


def test_strided_input() -> None:
    _, layer = make(32, 16, True, torch.bfloat16)
    wide = torch.randn(5, 80, dtype=torch.bfloat16)
    assert torch.equal(layer(wide[:, 16:48]), layer(wide[:, 16:48].contiguous()))
    assert torch.equal(layer(wide[:1, 16:48]), layer(wide[:1, 16:48].contiguous()))


@pytest.mark.parametrize("bias", [False, True])
def test_safetensors_round_trip(bias: bool, tmp_path) -> None:
    _, layer = make(32, 48, bias, torch.bfloat16)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = Fp8Linear.empty(32, 48, bias, torch.bfloat16, "meta")
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert loaded.state_dict().keys() == layer.state_dict().keys()
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(loaded(x), layer(x))


def test_compiled_equals_eager() -> None:
    _, layer = make(64, 48, True, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T in (5, 1, 64):
        x = torch.randn(T, 64, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), layer(x))


def test_fast_accumulation_changes_nothing_on_a_cpu() -> None:
    _, layer = make(64, 48, True, torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with graph_mode("inductor", "fast"):
        fast = layer(x)
    assert torch.equal(fast, layer(x))


def test_exports_with_any_number_of_tokens() -> None:
    _, layer = make(64, 48, True, torch.bfloat16)
    dim = torch.export.Dim("tokens", min=1, max=512)
    program = torch.export.export(layer, (torch.randn(5, 64, dtype=torch.bfloat16),), dynamic_shapes=({0: dim},))
    for T in (1, 2, 200):
        x = torch.randn(T, 64, dtype=torch.bfloat16)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("kind", ["library", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_traces_for_cuda_to_one_scaled_mm(dtype: torch.dtype, kind: Linears) -> None:
    """Needs no GPU: fake tensors carry the device. The weight is passed as it is stored."""
    with FakeTensorMode(), graph_mode("inductor", kind):
        layer = Fp8Linear.empty(64, 48, True, dtype, "cuda")
        x = torch.empty(5, 64, dtype=dtype, device="cuda")
        graph = make_fx(layer)(x).graph
    targets = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert targets.count("aten._scaled_mm.default") == 1
    product = next(n for n in graph.nodes if str(n.target) == "aten._scaled_mm.default")
    assert product.args[7:] == ((True,) if kind == "fast" else ())  # use_fast_accum; False is left out
    assert "aten.mm.default" not in targets
    assert "aten.clamp.default" in targets  # torch 2.12 saturates in the cast itself, older ones do not
    out = next(n for n in graph.nodes if n.op == "output").args[0].meta["val"]
    assert out.shape == (5, 48) and out.dtype == dtype and out.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, N", [(96, 48), (1536, 2048), (8960, 1536)])
def test_gpu_equals_cpu_arithmetic(dtype: torch.dtype, K: int, N: int) -> None:
    """The tensor cores align the products of a block to the largest of them and keep 13 fraction bits of each.

    So each of K products is off by at most 2^-13 of the largest one, and a running sum by 2^-13 of itself.
    """
    for bias in (False, True):
        _, layer = make(K, N, bias, dtype)
        for T in TOKENS:
            x = (torch.randn(T, K) * 1.5).to(dtype)
            y = layer.to("cuda")(x.cuda()).cpu()
            layer.to("cpu")
            expected, bound = reference(layer, x)
            size = bound / ((K + 3) * torch.finfo(torch.float32).eps)  # sum |products|
            scale = (layer.input_scale * layer.weight_scale).item()
            q = (x.float() / layer.input_scale).abs().clamp(max=448).amax(1, keepdim=True)
            largest = q * layer.weight.float().abs().amax(1) * scale  # [T, N]
            bound = 2.0**-13 * (K * largest + size) + torch.finfo(dtype).eps * expected.abs()
            worst = ((y.double() - expected).abs() / bound).max().item()
            assert worst <= 1, (T, bias, worst)


@pytest.mark.gpu
def test_gpu_saturates_and_replays() -> None:
    _, layer = make(256, 128, True, torch.bfloat16)
    layer.cuda()
    x = torch.full((4, 256), 1e4, dtype=torch.bfloat16, device="cuda")
    assert torch.isfinite(layer(x)).all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn(4, 256))
    graph.replay()
    assert torch.equal(y, layer(x))
