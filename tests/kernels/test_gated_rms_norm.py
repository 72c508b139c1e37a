from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.poison import poisoned

from jet_export.kernels.gated_rms_norm import gated_rms_norm_ref, gated_rms_norm_triton


def inputs(T: int, H: int, V: int, device, dtype=torch.float32) -> tuple[Any, ...]:
    """o, w_o, gate (a column slice of wider rows), eps."""
    r = torch.Generator().manual_seed(0)
    o, gate = torch.randn(T, H, V, generator=r), torch.randn(T, H * V + 24, generator=r)
    w_o = 1 + 0.1 * torch.randn(V, generator=r)
    gate = gate.to(device, dtype)[:, 8 : 8 + H * V].unflatten(-1, (H, V))
    return o.to(device, dtype), w_o.to(device, dtype), gate, 1e-5


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if torch.is_tensor(x) else x for x in args)


def test_ref_is_norm_then_gate():
    o, w_o, gate, eps = inputs(5, 2, 48, "cpu", torch.float64)
    want = torch.nn.functional.rms_norm(o, (48,), w_o, eps) * gate * torch.sigmoid(gate)
    assert relative_error(gated_rms_norm_ref(o, w_o, gate, eps), want) < 1e-12


@pytest.mark.parametrize("T, V", [(1, 64), (17, 48), (33, 256)])
def test_kernel_is_reference(device, T, V):
    args = inputs(T, 3, V, device)
    want = gated_rms_norm_ref(*widened(args))
    with poisoned():
        out = gated_rms_norm_triton(*args)
    assert relative_error(out, want) <= relative_error(gated_rms_norm_ref(*args), want) + 1e-5


def test_zero_stays_zero_whatever_the_gate(device):
    o, w_o, gate, eps = inputs(4, 2, 64, device)
    o[1], gate[1] = 0, torch.nan
    out = gated_rms_norm_triton(o, w_o, gate, eps)
    assert torch.equal(out[1], torch.zeros_like(out[1])) and out.isfinite().all()


def test_opcheck_with_strided_rows():
    o, w_o, gate, eps = inputs(6, 2, 64, "cpu")
    torch.library.opcheck(torch.ops.jet.gated_rms_norm, (o, w_o, gate, eps))
    torch.library.opcheck(torch.ops.jet.gated_rms_norm, (o.mT.contiguous().mT, w_o, gate, eps))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_one_rounding(dtype):
    args = inputs(300, 12, 256, "cuda", dtype)
    want = gated_rms_norm_ref(*widened(args))
    assert relative_error(torch.ops.jet.gated_rms_norm(*args), want) <= relative_error(want.to(dtype), want) * 1.01
