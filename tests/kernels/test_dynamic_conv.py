from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import relative_error
from helpers.packed import Packed
from helpers.poison import poisoned

from jet_export.kernels.dynamic_conv import dynamic_conv_ref, dynamic_conv_triton

RAGGED: dict[str, Any] = {"lens": [1, 2, 3, 40], "context": [5, 1, 0, 9], "rows": [3, 0, 5, 1]}


def test_ref_is_a_causal_convolution_where_taps_are_constant():
    p = Packed([20], context=[0], dtype=torch.float64)
    u, kappa, *rest = p.conv_args()
    taps = kappa[:1].expand_as(kappa)
    v = dynamic_conv_ref(u, taps, *rest)
    kernel = kappa[0].view(u.shape[1], 1, -1)
    y = F.conv1d(F.pad(u.T, (kernel.shape[-1] - 1, 0))[None], kernel, groups=u.shape[1])[0].T
    assert relative_error(v, F.silu(y)) < 1e-12


@pytest.mark.parametrize("W", [2, 3, 4])
def test_kernel_is_reference(device, W):
    p = Packed(**RAGGED, W=W, extra=8, device=device)
    exact, ref, got = p.conv_args(torch.float64), p.conv_args(), p.conv_args()
    want = dynamic_conv_ref(*exact)
    with poisoned():
        v = dynamic_conv_triton(*got)
    assert relative_error(v, want) <= relative_error(dynamic_conv_ref(*ref), want) + 1e-5
    assert torch.equal(got[2], ref[2])  # the state holds raw inputs: exact


@pytest.mark.parametrize("split", [[1, 2, 3, 4], [3, 7], [9, 1], [1] * 10])
@pytest.mark.parametrize("conv", [dynamic_conv_ref, dynamic_conv_triton], ids=["ref", "kernel"])
def test_split_with_carried_state_is_whole(device, conv, split):
    p = Packed([10], context=[0], device=device)
    u, kappa, state, _, slots, context = p.conv_args()
    whole_state = state.clone()
    whole = conv(u, kappa, whole_state, p.cu_seqlens, slots, context)
    parts, start = [], 0
    for n in split:
        bounds, held = torch.tensor([[0, n], [start, 0]], dtype=torch.int32, device=device)
        parts.append(conv(u[start : start + n], kappa[start : start + n], state, bounds, slots, held[:1]))
        start += n
    assert relative_error(torch.cat(parts), whole) < 1e-6
    assert torch.equal(state, whole_state)


@pytest.mark.parametrize("conv", [dynamic_conv_ref, dynamic_conv_triton], ids=["ref", "kernel"])
def test_padding_rows_are_inert_and_empty_context_is_zero_state(device, conv):
    p = Packed([2, 2, 3], context=[5, 0, 5], rows=[-1, 2, 0], device=device)
    u, kappa, state, *rest = p.conv_args()
    u[:2], kappa[:2] = torch.nan, torch.nan
    state[2], state[1], state[3] = torch.nan, 7.0, 8.0  # row 2 starts afresh: its old content must not count
    v = conv(u, kappa, state, *rest)
    assert torch.equal(v[:2], torch.zeros_like(v[:2]))
    assert v.isfinite().all() and state.isfinite().all()
    assert (state[1] == 7).all() and (state[3] == 8).all()


def test_opcheck_with_strided_rows():
    torch.library.opcheck(torch.ops.jet.dynamic_conv, Packed([3, 5], extra=8, device="cpu").conv_args())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_one_rounding(dtype):
    p = Packed([1, 2, 300], H=12, V=256, context=[5, 0, 5], dtype=dtype, device="cuda")
    want = dynamic_conv_ref(*p.conv_args(torch.float64))
    v = torch.ops.jet.dynamic_conv(*p.conv_args())
    assert relative_error(v, want) <= relative_error(want.to(dtype), want) * 1.01
