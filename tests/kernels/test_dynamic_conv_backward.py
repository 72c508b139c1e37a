"""The dynamic convolution in training: the inference reference's outputs, and autograd's gradients through them."""

import pytest
import torch
from helpers.compare import relative_error
from helpers.poison import poisoned

from jet_export.kernels.dynamic_conv_backward import (
    dynamic_conv_backward_triton,
    dynamic_conv_forward_triton,
    dynamic_conv_train,
)

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def inputs(lens: list[int], D: int, W: int, dtype: torch.dtype = torch.float64, device="cpu"):
    r = torch.Generator().manual_seed(W)
    T = sum(lens)
    u, kappa, dv = (torch.randn(T, n, generator=r).to(dtype).to(device) for n in (D + 8, D * W, D))
    return u[:, :D], kappa, torch.tensor([0, *lens], device=device).cumsum(0).int(), dv


def plain(u: torch.Tensor, kappa: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    """Sequence by sequence: a window of zeros and inputs, times the taps."""
    out = []
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        taps = kappa[begin:end].view(end - begin, u.shape[1], -1)
        W = taps.shape[2]
        window = torch.nn.functional.pad(u[begin:end], (0, 0, W - 1, 0)).unfold(0, W, 1)  # [T, D, W]
        out.append(torch.nn.functional.silu((taps * window).sum(-1)))
    return torch.cat(out)


@pytest.mark.parametrize("W", [1, 2, 4, 6])
@pytest.mark.parametrize("lens", [[1], [3], [1, 2, 3, 4, 65]], ids=str)
def test_gradients_are_autograds(lens: list[int], W: int) -> None:
    u, kappa, cu, dv = inputs(lens, 5, W)
    u, kappa = u.requires_grad_(), kappa.requires_grad_()
    got, want = dynamic_conv_train(u, kappa, cu), plain(u, kappa, cu)
    assert relative_error(got, want) < 1e-14
    for a, b in zip(*(torch.autograd.grad(x, (u, kappa), dv) for x in (got, want)), strict=True):
        assert relative_error(a, b) < 1e-14


def test_kernels_are_within_fp32_of_the_exact_gradients(device) -> None:
    """Three taps; four, as every model has, in test_jet_block_train.py."""
    u, kappa, cu, dv = inputs([1, 17], 12, 3, torch.float32, device)
    exact = [x.double().cpu().requires_grad_() for x in (u, kappa)]
    v = plain(exact[0], exact[1], cu.cpu())
    want_du, want_dkappa = torch.autograd.grad(v, exact, dv.double().cpu())
    with poisoned():
        got = dynamic_conv_forward_triton(u, kappa, cu)
        du = u.new_empty(u.shape)
        dkappa = dynamic_conv_backward_triton(u, kappa, cu, dv, du)
    assert relative_error(got, v) < 1e-6
    assert relative_error(du, want_du) < 1e-6 and relative_error(dkappa, want_dkappa) < 1e-6


def test_one_kernel_for_all_tokens_is_a_static_convolution() -> None:
    """As Gated DeltaNet has it: the expanded kernel's gradient is the sum over the tokens."""
    u, kappa, cu, dv = inputs([4, 9], 6, 4)
    static = kappa[0].clone().requires_grad_()
    v = dynamic_conv_train(u, static.expand(len(u), -1), cu)
    (got,) = torch.autograd.grad(v, static, dv)
    repeated = static.detach().repeat(len(u), 1).requires_grad_()
    (want,) = torch.autograd.grad(plain(u, repeated, cu), repeated, dv)
    assert relative_error(got, want.sum(0)) < 1e-14


def test_opcheck() -> None:
    u, kappa, cu, _ = inputs([2, 5], 6, 4, torch.float32)
    transposed = kappa.t().contiguous().t()
    args = (u.requires_grad_(), transposed.requires_grad_(), cu)
    torch.library.opcheck(torch.ops.jet.dynamic_conv_train, args, test_utils=OPCHECKS)


@pytest.mark.gpu
def test_16_bit_gradients_are_one_rounding() -> None:
    u, kappa, cu, dv = inputs([1, 300, 64], 3072, 4, torch.bfloat16, "cuda")
    exact = [x.double().requires_grad_() for x in (u, kappa)]
    want = torch.autograd.grad(plain(exact[0], exact[1], cu), exact, dv.double())
    leaves = [x.detach().requires_grad_() for x in (u, kappa)]
    got = torch.autograd.grad(dynamic_conv_train(*leaves, cu), leaves, dv)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1.01 * relative_error(b.bfloat16(), b)
