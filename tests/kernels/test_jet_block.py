import re
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.kernel_compiler import compile_report
from helpers.packed import Packed
from helpers.paged import interpreter_fp8
from helpers.poison import poisoned
from helpers.rounded_chunk import rounded_chunk

from jet_export.kernels.dynamic_conv import dynamic_conv_ref
from jet_export.kernels.form import Form
from jet_export.kernels.gated_rms_norm import gated_rms_norm_ref
from jet_export.kernels.jet_block import jet_block_ref, jet_block_triton
from jet_export.kernels.state_layout import EXTRA, NO_BUFFER, buffer_rows
from jet_export.model.fp8 import FP8, quantize

STATES = (6, 7)  # conv_state and recurrent_state among the arguments


def check(got: torch.Tensor, got_args: tuple, p: Packed, decode: bool) -> None:
    """Output and states no further from the fp64 reference than the fp32 reference is, plus 1e-5."""
    exact, ref = p.block_args(decode, torch.float64), p.block_args(decode)
    want, out_ref = jet_block_ref(*exact), jet_block_ref(*ref)
    assert relative_error(got, want) <= relative_error(out_ref, want) + 1e-5
    for i in STATES:
        assert relative_error(got_args[i], exact[i]) <= relative_error(ref[i], exact[i]) + 1e-5


@pytest.mark.parametrize("K, V, W", [(32, 64, 4), (96, 40, 3), (128, 32, 4)])
def test_prefill_is_reference(device, K, V, W):
    p = Packed([1, 2, 3, 65], H=2, K=K, V=V, W=W, extra=8, context=[5, 1, 0, 5], rows=[3, 0, -1, 5], device=device)
    args = p.block_args(False)
    with poisoned():
        out = jet_block_triton(*args)
    check(out, args, p, False)


@pytest.mark.parametrize("K, V, W", [(32, 64, 4), (96, 80, 3)])
def test_decode_is_reference_and_prefill(device, K, V, W):
    p = Packed([1] * 4, K=K, V=V, W=W, extra=8, context=[5, 1, 0, 5], rows=[3, 0, -1, 5], device=device)
    for decode in (True, False):
        args = p.block_args(decode)
        with poisoned():
            out = jet_block_triton(*args)
        check(out, args, p, decode)


@pytest.mark.parametrize("split", [[1, 2, 3, 30], [33, 3]])
@pytest.mark.parametrize("block", [jet_block_ref, jet_block_triton], ids=["ref", "kernel"])
def test_split_with_carried_states_is_whole(device, block, split):
    p = Packed([36], context=[0], H=1, device=device)
    qkuz, ba, kappa, *weights, conv, state, cu, slots, context, H, K, V, eps, _ = p.block_args(False)
    whole_conv, whole_state = conv.clone(), state.clone()
    whole = block(qkuz, ba, kappa, *weights, whole_conv, whole_state, cu, slots, context, H, K, V, eps, False)
    parts, start = [], 0
    for n in split:
        bounds, held = torch.tensor([[0, n], [start, 0]], dtype=torch.int32, device=device)
        inputs = (x[start : start + n] for x in (qkuz, ba, kappa))
        parts.append(block(*inputs, *weights, conv, state, bounds, slots, held[:1], H, K, V, eps, n == 1))
        start += n
    assert relative_error(torch.cat(parts), whole) < 1e-5
    assert torch.equal(conv, whole_conv) and relative_error(state, whole_state) < 1e-5


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("block", [jet_block_ref, jet_block_triton], ids=["ref", "kernel"])
def test_padding_rows_are_inert_and_empty_context_is_zero_state(device, block, decode):
    p = Packed([1, 1, 1] if decode else [2, 20, 3], context=[5, 0, 5], rows=[-1, 2, 0], H=1, device=device)
    args = p.block_args(decode)
    end = int(p.cu_seqlens[1])
    for x in args[:3]:
        x[:end] = torch.nan
    for i in STATES:
        args[i][2], args[i][1], args[i][3] = torch.nan, 7.0, 8.0
    out = block(*args)
    assert torch.equal(out[:end], torch.zeros_like(out[:end])) and out.isfinite().all()
    for i in STATES:
        assert args[i].isfinite().all() and (args[i][1] == 7).all() and (args[i][3] == 8).all()


@pytest.mark.blas
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_a_row_does_not_see_the_others(device, decode):
    p = Packed([1, 1, 1] if decode else [4, 20, 3], H=1, device=device)
    first, second = p.block_args(decode), p.block_args(decode)
    s, e = int(p.cu_seqlens[1]), int(p.cu_seqlens[2])
    for x in second[:3]:
        x[:s], x[e:] = torch.randn_like(x[:s]), torch.randn_like(x[e:])
    one, two = jet_block_triton(*first), jet_block_triton(*second)
    slot = int(p.slots[1])
    assert torch.equal(one[s:e], two[s:e]) and not torch.equal(one[:s], two[:s])
    assert all(torch.equal(first[i][slot], second[i][slot]) for i in STATES)


FORMS = {f.name.lower(): (f, False) for f in (Form.PREFILL, Form.DECODE, Form.MIXED)}
FORMS |= {f"{f.name.lower()} held": (f, True) for f in (Form.DECODE, Form.MIXED, Form.VERIFY)}


@pytest.mark.parametrize("form, held", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("block", [jet_block_ref, jet_block_triton], ids=["ref", "kernel"])
def test_codes_are_those_of_the_rounded_result(device, monkeypatch, block, form, held):
    """With out_scale, bit for bit what quantising the plain call's result gives, saturated values and padding too; the
    states do not change by it. fp16: the interpreter rounds to it as a GPU does."""
    device, dtype = "cpu" if block is jet_block_ref else device, torch.float16
    interpreter_fp8(monkeypatch)
    lens = {Form.DECODE: [1, 1, 1], Form.MIXED: [1, 2, 20, 1], Form.VERIFY: [3, 1, 5]}.get(form, [3, 2, 20])
    p = Packed(lens, context=[9, 5, 0, 8][: len(lens)], rows=[3, -1, 0, 2][: len(lens)], dtype=dtype, device=device)
    args = p.block_args(form)
    buffer: list[Any] = list(NO_BUFFER)
    if held:
        S, (H, K, V) = len(p.recurrent_state), (p.H, p.K, p.V)
        args = (*args[:6], torch.randn(S, p.W - 1 + 5, H * V, device=device).to(dtype), *args[7:])
        buffer = [torch.randn(S, H, buffer_rows(2, 5), K + V + EXTRA, device=device) * 0.1]
        buffer += [torch.full((S, H), 4, dtype=torch.int32, device=device), 2]
    plain, coded = ([x.clone() if torch.is_tensor(x) else x for x in (*args, *buffer)] for _ in range(2))
    out = block(*plain)
    scale = out.float().abs().amax().reshape(1) / 700
    with poisoned():
        got = block(*coded, scale)
    assert got.dtype == FP8 and (got.float().abs() == 448).any()
    want = quantize(out, scale)
    # A GPU's division is two units in the last place off: it decides where a quotient lies between two codes.
    assert (got.float() != want.float()).sum() <= (1 if got.is_cuda else 0)
    for x, y in zip(plain, coded, strict=True):
        assert not torch.is_tensor(x) or torch.equal(x, y)


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_opcheck_with_strided_rows(decode):
    p = Packed([1, 1] if decode else [2, 5], extra=8)
    for out_scale in (None, torch.tensor([0.01])):
        torch.library.opcheck(torch.ops.jet.jet_block, (*p.block_args(decode), *NO_BUFFER, out_scale))


def test_compiles_without_a_graph_break():
    p = Packed([2, 5], extra=8)
    eager, compiled = p.block_args(False), p.block_args(False)
    want = torch.ops.jet.jet_block(*eager, *NO_BUFFER, None)
    got = torch.compile(lambda *args: torch.ops.jet.jet_block(*args, *NO_BUFFER, None) * 1, fullgraph=True)(*compiled)
    assert torch.equal(got, want) and all(torch.equal(eager[i], compiled[i]) for i in STATES)


@pytest.mark.parametrize(
    "models",
    [
        ["2b-bfloat16-float32", "4b-bfloat16-float32"],
        pytest.param(
            ["4b-bfloat16-bfloat16", "2x256x288-bfloat16-float32", "2x128x576-bfloat16-float32", "4b-float32-float32"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["published", "others"],
)
def test_kernels_fit_sm_90(models):
    """Compiled ahead of time: within Hopper's shared memory, without global scratch (plugins provide none) and without
    fp64 arithmetic (which Inductor's typing of Python floats would introduce)."""
    modes = "prefill", "decode", "codes_prefill", "codes_decode"
    report = compile_report([f"{model}-{mode}" for model in models for mode in modes])
    two_forms = sum("bfloat16-" in m and "x256x288" not in m for m in models)  # of the scan, with K up to 128
    assert len(report) == 2 * (len(models) * (5 + 1) + two_forms)
    for kernel in report:
        assert kernel["shared"] <= 227 * 1024 and kernel["scratch"] == kernel["f64"] == 0, kernel


@pytest.mark.slow
def test_kernels_with_a_step_buffer_fit_sm_90():
    """Those of DECODE, MIXED and VERIFY beside a step buffer and a ring, as above. Those of
    steps spill two registers at most."""
    verify = ["2b-bfloat16-float32-verify", "4b-bfloat16-bfloat16-verify"]
    modes = "held_decode", "held_mixed", "codes_held_mixed"
    report = compile_report([*verify, *(f"2b-bfloat16-float32-{mode}" for mode in modes)])
    names = {k["kernel"] for k in report}
    assert {"decode_inputs_kernel", "verify_inputs_kernel", "deferred_step_kernel", "flush_kernel"} <= names
    for kernel in report:
        assert kernel["shared"] <= 227 * 1024 and kernel["scratch"] == kernel["f64"] == 0, kernel
        assert kernel["stack"] <= 8 or not re.search("inputs|deferred|flush", kernel["kernel"]), kernel


# On a GPU


def rounded_block(p: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """The block in torch, rounded where the prefill kernels round: v, what rounded_chunk rounds, o, the result."""
    qkuz, ba, kappa, A_log, dt_bias, w_o, conv, state, cu, slots, context, H, K, V, eps, _ = p.block_args(False)
    dtype, T = qkuz.dtype, qkuz.shape[0]
    q, k, u, gate = qkuz[:, : 2 * H * (K + V)].split([H * K, H * K, H * V, H * V], -1)
    v = dynamic_conv_ref(u, kappa, conv, cu, slots, context).to(dtype).view(T, H, V)
    q, k = (torch.nn.functional.silu(x.float()).view(T, H, K) for x in (q, k))
    b, a = ba.float().split(H, -1)
    beta, g = b.sigmoid().to(dtype), -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)
    o = torch.zeros_like(v)
    for n, slot in enumerate(slots.tolist()):
        s = slice(int(cu[n]), int(cu[n + 1]))
        start = state[slot] * (context[n] > 0)
        o_n, state[slot] = rounded_chunk(q[s], k[s], v[s], beta[s], g[s], start, dtype)
        o[s] = o_n.to(dtype)
    return gated_rms_norm_ref(o, w_o, gate.reshape(T, H, V), eps).reshape(T, H * V), state


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H, K, V", [(12, 96, 256), (16, 128, 256), (2, 32, 64)])
def test_16_bit_error_is_that_of_the_rounded_form(H, K, V, dtype):
    p = Packed([1, 64, 333], H=H, K=K, V=V, context=[5, 0, 5], dtype=dtype, extra=8, device="cuda")
    exact, args = p.block_args(False, torch.float64), p.block_args(False)
    want, out = jet_block_ref(*exact), torch.ops.jet.jet_block(*args, *NO_BUFFER, None)
    rounded, rounded_state = rounded_block(p)
    rows = p.slots.long()
    assert relative_error(out, want) <= 1.1 * relative_error(rounded, want)
    assert relative_error(args[7][rows], exact[7][rows]) <= 1.1 * relative_error(rounded_state[rows], exact[7][rows])
    assert torch.equal(args[6].double(), exact[6])


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, K, V", [(12, 96, 256), (16, 128, 256), (4, 128, 576), (2, 32, 64)])
def test_bf16_decode_rounds_once(H, K, V, state_dtype):
    p = Packed([1] * 9, H=H, K=K, V=V, dtype=torch.bfloat16, state_dtype=state_dtype, extra=8, device="cuda")
    exact, args = p.block_args(True, torch.float64), p.block_args(True)
    want, out = jet_block_ref(*exact), torch.ops.jet.jet_block(*args, *NO_BUFFER, None)
    beta_rounding = 2**-9  # sigmoid(b) is rounded to the model dtype by definition; fp64's reference does not
    assert relative_error(out, want) <= relative_error(want.bfloat16(), want) + beta_rounding
    assert relative_error(args[7], exact[7]) <= relative_error(exact[7].to(state_dtype), exact[7]) + beta_rounding


@pytest.mark.gpu
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_replays_in_a_cuda_graph(decode):
    p = Packed([1] * 5 if decode else [70, 1, 130], H=4, K=96, V=256, dtype=torch.bfloat16, device="cuda")
    eager, captured = p.block_args(decode), p.block_args(decode)
    want = torch.ops.jet.jet_block(*eager, *NO_BUFFER, None)
    torch.ops.jet.jet_block(*p.block_args(decode), *NO_BUFFER, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.jet.jet_block(*captured, *NO_BUFFER, None)
    graph.replay()
    assert torch.equal(out, want) and all(torch.equal(eager[i], captured[i]) for i in STATES)
