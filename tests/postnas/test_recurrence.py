"""linear_recurrence: its chunks are the recurrence, with gradients; and its cases are what they are said to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.gated_delta_rule_train import gated_delta_rule_train
from jet_export.postnas.mixer import unit
from jet_export.postnas.recurrence import linear_recurrence, linear_recurrence_ref

Inputs = tuple[Tensor, ...]


def inputs(T: int, erases: bool, seed: int = 0) -> Inputs:
    """q, k, v, g, b, c of two heads, K 8, V 6, in fp64."""
    rng = torch.Generator().manual_seed(seed)
    q, k, kappa = (torch.randn(T, 2, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    v = torch.randn(T, 2, 6, generator=rng, dtype=torch.float64)
    g = -3 * torch.rand(T, 2, 8, generator=rng, dtype=torch.float64)
    kappa = F.normalize(kappa, dim=-1)
    a = torch.rand(T, 2, 8, generator=rng, dtype=torch.float64)
    return (q, k, v, g, -a * kappa, kappa) if erases else (q, k, v, g)


def call(function, args: Inputs, bounds: list[int], **more) -> Tensor:
    b, c = args[4:] or (None, None)
    return function(*args[:4], b, c, torch.tensor(bounds, dtype=torch.int32), **more)


@pytest.mark.parametrize("erases", [False, True])
@pytest.mark.parametrize("bounds", [[0, 1], [0, 16], [0, 5, 38, 39]])
def test_chunks_are_the_recurrence_and_have_its_gradients(erases: bool, bounds: list[int]) -> None:
    args = tuple(x.requires_grad_() for x in inputs(bounds[-1], erases))
    wanted = call(linear_recurrence_ref, args, bounds)
    given = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, args, given, allow_unused=True)
    ours = call(linear_recurrence, args, bounds)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(ours, args, given)
    for x, y, arg in zip(found, expected, args, strict=True):
        torch.testing.assert_close(x, torch.zeros_like(arg) if y is None else y, rtol=1e-8, atol=1e-8)


def test_strong_decay_does_not_overflow() -> None:
    """Where exp(-G) alone would: against fp64, in the norm, no worse than the recurrence in fp32 plus 1e-5."""
    q, k, v, g, *erasure = inputs(64, True)
    exact = (q, k, v, 10 * g, *erasure)
    args = tuple(x.float() for x in exact)
    wanted = call(linear_recurrence_ref, exact, [0, 64])
    ours, theirs = (
        float((call(f, args, [0, 64]) - wanted).norm() / wanted.norm())
        for f in (linear_recurrence, linear_recurrence_ref)
    )
    assert ours <= theirs + 1e-5


def test_kda_with_one_decay_a_head_is_the_gated_delta_rule() -> None:
    q, k, v, g, *_ = inputs(40, True)
    bounds = torch.tensor([0, 7, 40], dtype=torch.int32)
    g, beta = g[..., 0], torch.rand(40, 2, dtype=torch.float64)
    wanted, _ = gated_delta_rule_train(q, k, v, beta, g, bounds, l2=False)
    decay, b = g[..., None].expand(q.shape), beta[..., None]
    ours = linear_recurrence(q * 8**-0.5, b * k, v, decay, -b * k, decay.exp() * k, bounds)
    torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-8)
    assert unit(q).square().sum(-1).sub(1).abs().max() < 1e-5
