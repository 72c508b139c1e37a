"""Gated DeltaNet as a case of jet::jet_block: one convolution kernel for all tokens, over q, k and the values, and
heads of q and k that several heads of values share."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import relative_error
from helpers.kernel_compiler import compile_report
from helpers.packed import Packed
from helpers.poison import poisoned

from jet_export.kernels.dynamic_conv import dynamic_conv_ref, dynamic_conv_triton
from jet_export.kernels.form import Form
from jet_export.kernels.gated_delta_rule import gated_delta_rule_triton, packed_gated_delta_rule_ref
from jet_export.kernels.jet_block import jet_block_ref, jet_block_triton
from jet_export.kernels.state_layout import EXTRA, NO_BUFFER, buffer_rows

STATES = (6, 7)  # conv_state and recurrent_state among the arguments
SIZES: dict[str, Any] = {"K": 16, "V": 16, "context": [5, 1, 0, 9], "rows": [3, 0, -1, 1]}
RAGGED: dict[str, Any] = {"lens": [1, 2, 3, 18], **SIZES}
STEPS: dict[str, Any] = {"lens": [1] * 4, **SIZES}


def test_a_static_convolution_is_conv1d(device) -> None:
    p = Packed([9, 20], context=[0, 0], key_heads=1, dtype=torch.float64, device=device)
    u, kappa, *rest = p.conv_args()
    kernel = kappa.view(u.shape[1], 1, -1)
    want = torch.cat([F.conv1d(F.pad(x.T, (3, 0))[None], kernel, groups=u.shape[1])[0].T for x in u.split([9, 20])])
    assert relative_error(dynamic_conv_ref(u, kappa, *rest), F.silu(want)) < 1e-12
    fp32 = p.conv_args(torch.float32)
    with poisoned():
        assert relative_error(dynamic_conv_triton(*fp32), F.silu(want)) < 1e-5


@pytest.mark.parametrize("rollback", [0, 4])
@pytest.mark.parametrize("conv", [dynamic_conv_ref, dynamic_conv_triton], ids=["ref", "kernel"])
def test_one_kernel_for_all_tokens_is_the_same_kernel_for_each(device, conv, rollback) -> None:
    """To the bit, over more than one of the kernel's chunks; before the call lie a shifted state or a ring."""
    lens = {**RAGGED, "lens": [1, 2, 3, 70]}
    p = Packed(**lens, key_heads=1, extra=8, device=device)
    S, _, C = p.conv_state.shape
    p.tensors["conv_state"] = torch.randn(S, 3 + rollback, C, generator=torch.Generator().manual_seed(1)).to(device)
    u, kappa, state, *rest = p.conv_args()
    other = state.clone()
    each = conv(u, kappa.expand(u.shape[0], -1).contiguous(), other, *rest)
    assert torch.equal(conv(u, kappa, state, *rest), each) and torch.equal(state, other)


@pytest.mark.parametrize("rollback", [0, 4])
@pytest.mark.parametrize("most", [1, 4])
def test_one_launch_for_few_tokens_is_the_two_for_any(device, most, rollback) -> None:
    """Outputs and states to the bit, of a shifted state and of a ring, padding rows too."""
    lens = {**RAGGED, "lens": [1] * 4 if most == 1 else [4, 1, 2, 3]}
    p = Packed(**lens, H=2, key_heads=1, extra=8, device=device)
    S, _, C = p.conv_state.shape
    p.tensors["conv_state"] = torch.randn(S, 3 + rollback, C, generator=torch.Generator().manual_seed(1)).to(device)
    u, kappa, state, cu, slots, context = p.conv_args(torch.float32)
    other = state.clone()
    with poisoned():
        two = dynamic_conv_triton(u, kappa, state, cu, slots, context)
        one = dynamic_conv_triton(u, kappa, other, cu, slots, context, most=most)
    assert torch.equal(one, two) and torch.equal(other, state) and one.isfinite().all()


@pytest.mark.parametrize("rule", [packed_gated_delta_rule_ref, gated_delta_rule_triton], ids=["ref", "kernel"])
def test_shared_heads_are_repeated_ones(device, rule) -> None:
    """Of a call that launches the kernels of prompts and those of single tokens."""
    p = Packed(**RAGGED, H=4, key_heads=2, device=device)
    q, k, v, beta, g, state, *rest = p.rule_args(Form.MIXED)
    other = state.clone()
    repeated = rule(q.repeat_interleave(2, 1), k.repeat_interleave(2, 1), v, beta, g, other, *rest)
    assert torch.equal(rule(q, k, v, beta, g, state, *rest), repeated) and torch.equal(state, other)


def check(p: Packed, form: Form, buffer: tuple = ()) -> None:
    """Output and states no further from the fp64 reference than the fp32 reference is, plus 1e-5."""
    exact, ref, got = p.block_args(form, torch.float64), p.block_args(form), p.block_args(form)
    buffers = [tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in buffer) for _ in range(3)]
    want, out_ref = jet_block_ref(*exact, *buffers[0]), jet_block_ref(*ref, *buffers[1])
    with poisoned():
        out = jet_block_triton(*got, *buffers[2])
    assert relative_error(out, want) <= relative_error(out_ref, want) + 1e-5
    for i in STATES:
        assert relative_error(got[i], exact[i]) <= relative_error(ref[i], exact[i]) + 1e-5
    if buffer:
        assert relative_error(buffers[2][0], buffers[0][0]) <= relative_error(buffers[1][0], buffers[0][0]) + 1e-5
        assert torch.equal(buffers[2][1], buffers[0][1])


@pytest.mark.parametrize("form, H, HK, V", [(Form.PREFILL, 2, 2, 16), (Form.DECODE, 3, 1, 48), (Form.MIXED, 2, 1, 48)])
def test_block_is_reference(device, form, H, HK, V) -> None:
    lens = STEPS if form is Form.DECODE else RAGGED
    check(Packed(**{**lens, "V": V}, H=H, key_heads=HK, extra=8, device=device), form)


@pytest.mark.parametrize("form", [Form.DECODE, Form.VERIFY])
def test_block_beside_a_step_buffer_is_reference(device, form) -> None:
    """conv_state is a ring there; two of the sequences hold tokens that their states do not."""
    H, K, V, interval, rollback = 2, 16, 16, 3, 4
    lens = STEPS if form is Form.DECODE else {**STEPS, "lens": [1, 4, 2, 3]}
    p = Packed(**lens, H=H, key_heads=1, device=device)
    S, C = p.conv_state.shape[0], p.conv_state.shape[2]
    rng = torch.Generator().manual_seed(1)
    p.tensors["conv_state"] = torch.randn(S, 3 + rollback, C, generator=rng).to(device)
    rows = buffer_rows(interval, rollback)
    held = torch.randn(S, H, rows, K + V + EXTRA, generator=rng) * 0.3
    held[..., K + V] = -held[..., K + V].abs()
    position = torch.zeros(S, H, dtype=torch.int32)
    for n, slot in enumerate(p.slots.tolist()):
        if slot >= 0:
            position[slot] = max(int(p.context_lens[n]) - n, 0)
    check(p, form, (held.to(device), position.to(device), interval))


@pytest.mark.parametrize("split", [[1, 2, 17]])
@pytest.mark.parametrize("block", [jet_block_ref, jet_block_triton], ids=["ref", "kernel"])
def test_split_with_carried_states_is_whole(device, block, split) -> None:
    p = Packed([20], context=[0], H=2, K=16, V=16, key_heads=1, device=device)
    qkuz, ba, kappa, *weights, conv, state, cu, slots, context, H, K, V, eps, _ = p.block_args(False)
    whole_conv, whole_state = conv.clone(), state.clone()
    whole = block(qkuz, ba, kappa, *weights, whole_conv, whole_state, cu, slots, context, H, K, V, eps, Form.PREFILL)
    parts, start = [], 0
    for n in split:
        bounds, held = torch.tensor([[0, n], [start, 0]], dtype=torch.int32, device=device)
        inputs = qkuz[start : start + n], ba[start : start + n], kappa
        form = Form.DECODE if n == 1 else Form.PREFILL
        parts.append(block(*inputs, *weights, conv, state, bounds, slots, held[:1], H, K, V, eps, form))
        start += n
    assert relative_error(torch.cat(parts), whole) < 1e-5
    assert torch.equal(conv, whole_conv) and relative_error(state, whole_state) < 1e-5


@pytest.mark.parametrize("form", [Form.PREFILL, Form.DECODE])
def test_padding_rows_are_inert(device, form) -> None:
    p = Packed(
        [1, 1, 1] if form is Form.DECODE else [2, 5, 3], context=[5, 0, 5], rows=[-1, 2, 0], key_heads=1, device=device
    )
    args = p.block_args(form)
    end = int(p.cu_seqlens[1])
    for x in args[:2]:
        x[:end] = torch.nan
    for i in STATES:
        args[i][2], args[i][1], args[i][3] = torch.nan, 7.0, 8.0
    out = jet_block_triton(*args)
    assert torch.equal(out[:end], torch.zeros_like(out[:end])) and out.isfinite().all()
    for i in STATES:
        assert args[i].isfinite().all() and (args[i][1] == 7).all() and (args[i][3] == 8).all()


def test_opcheck_with_strided_rows() -> None:
    p = Packed([2, 5], key_heads=1, extra=8)
    torch.library.opcheck(torch.ops.jet.jet_block, (*p.block_args(Form.PREFILL), *NO_BUFFER, None))


@pytest.mark.slow
def test_kernels_fit_sm_90() -> None:
    """Those of Qwen3.5-4B's sizes, compiled ahead of time: shared memory, no global scratch, no fp64, no spills."""
    modes = "prefill", "decode", "held_decode", "verify"
    report = compile_report([f"qwen3.5_4b-bfloat16-float32-{mode}" for mode in modes])
    assert {"chunk_scan_kernel", "decode_kernel", "dynamic_conv_kernel", "conv_rows_kernel"} <= {
        k["kernel"] for k in report
    }
    for kernel in report:
        assert kernel["shared"] <= 227 * 1024 and kernel["scratch"] == kernel["f64"] == kernel["stack"] == 0, kernel
