"""The gated norm's gradients: autograd's through the inference reference."""

import pytest
import torch
from helpers.compare import relative_error
from helpers.poison import poisoned

from jet_export.kernels.gated_rms_norm import gated_rms_norm_ref
from jet_export.kernels.gated_rms_norm_backward import (
    gated_rms_norm_backward_torch,
    gated_rms_norm_backward_triton,
    gated_rms_norm_forward_torch,
)


def case(T: int, H: int, V: int, dtype: torch.dtype, device="cpu"):
    """o, w_o, gate (a view of wider rows), dout, and the exact do, dw_o, dgate."""
    r = torch.Generator().manual_seed(V)
    o, w_o, wide, dout = (torch.randn(*s, generator=r).to(dtype) for s in ((T, H, V), (V,), (T, H * V + 16), (T, H, V)))
    gate = wide.to(device)[:, 8 : 8 + H * V].unflatten(1, (H, V))
    exact = [x.double().cpu().requires_grad_() for x in (o, w_o, gate)]
    want = torch.autograd.grad(gated_rms_norm_ref(exact[0], exact[1], exact[2], 1e-5), exact, dout.double())
    return o.to(device), w_o.to(device), gate, dout.to(device), want


def test_gradients_are_autograds() -> None:
    o, w_o, gate, dout, want = case(7, 3, 10, torch.float64)
    assert (
        relative_error(gated_rms_norm_forward_torch(o, w_o, gate, 1e-5), gated_rms_norm_ref(o, w_o, gate, 1e-5)) < 1e-14
    )
    for a, b in zip(gated_rms_norm_backward_torch(o, w_o, gate, 1e-5, dout), want, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("V", [20, 1030])
def test_kernel_is_within_fp32_of_the_exact_gradients(device, V: int) -> None:
    o, w_o, gate, dout, want = case(11, 2, V, torch.float32, device)
    with poisoned():
        dgate = gate.new_empty(gate.shape)
        do, dw_o = gated_rms_norm_backward_triton(o, w_o, gate, 1e-5, dout, dgate)
    for a, b in zip((do, dw_o, dgate), want, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("V", [144, 256, 576])
def test_16_bit_gradients_are_one_rounding(V: int) -> None:
    o, w_o, gate, dout, want = case(300, 12, V, torch.bfloat16, "cuda")
    dgate = gate.new_empty(gate.shape)
    do, dw_o = gated_rms_norm_backward_triton(o, w_o, gate, 1e-5, dout, dgate)
    for a, b in ((do, want[0]), (dgate, want[2])):
        assert relative_error(a, b) <= 1.01 * relative_error(b.bfloat16(), b)
    assert relative_error(dw_o, want[1]) < 1e-5
