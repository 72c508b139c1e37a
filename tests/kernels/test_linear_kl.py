"""linear_kl: torch's losses and their gradients, whatever the chunk."""

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import relative_error

from jet_export.kernels.linear_kl import linear_kl
from jet_export.utils.errors import JetExportError


def inputs(T: int, V: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    r = torch.Generator().manual_seed(T)
    x, w, x_teacher, w_teacher = (torch.randn(*s, generator=r).to(dtype) for s in ((T, 8), (V, 8), (T, 6), (V, 6)))
    labels = torch.randint(0, V, (T,), generator=r)
    labels[::3] = -100
    return [x.requires_grad_(), w.requires_grad_(), x_teacher, w_teacher, labels]


def plain(x, w, x_teacher, w_teacher, labels, kl_weight, ce_weight, s) -> tuple[torch.Tensor, ...]:
    some = labels != -100
    z, teacher = x @ w.t(), x_teacher @ w_teacher.t()
    log_p, log_teacher = (F.log_softmax(y[some] / s, -1) for y in (z, teacher))
    kl = s * s * F.kl_div(log_p, log_teacher, reduction="batchmean", log_target=True)
    ce = F.cross_entropy(z, labels)
    return kl_weight * kl + ce_weight * ce, kl, ce


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_losses_and_gradients_are_torchs(chunk: int, temperature: float) -> None:
    args = inputs(17, 29)
    got = linear_kl(*args, kl_weight=0.7, ce_weight=0.2, temperature=temperature, chunk=chunk)
    want = plain(*args, 0.7, 0.2, temperature)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-12
    grads = (torch.autograd.grad(3 * loss, args[:2]) for loss in (got[0], want[0]))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-12


def test_a_frozen_weight_has_no_gradient_and_x_has_the_same() -> None:
    x, w, *rest = inputs(10, 12)
    both = torch.autograd.grad(linear_kl(x, w, *rest, kl_weight=1, ce_weight=1)[0], (x, w))
    (alone,) = torch.autograd.grad(linear_kl(x, w.detach(), *rest, kl_weight=1, ce_weight=1)[0], x)
    assert torch.equal(alone, both[0])
    with torch.no_grad():
        assert not linear_kl(x, w, *rest, kl_weight=1, ce_weight=1)[0].requires_grad


def test_without_labels_all_is_zero() -> None:
    x, w, *teacher, labels = inputs(6, 5)
    loss, kl, ce = linear_kl(x, w, *teacher, torch.full_like(labels, -100), kl_weight=1, ce_weight=1)
    assert loss == kl == ce == 0
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


def test_the_student_that_is_the_teacher_has_no_kl() -> None:
    x, w, _, _, labels = inputs(6, 5)
    loss, kl, _ = linear_kl(x, w, x, w, labels, kl_weight=1, ce_weight=0)
    assert abs(kl) < 1e-14 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-14


def test_opcheck() -> None:
    args = inputs(6, 5, torch.float32)
    torch.library.opcheck(torch.ops.jet.linear_kl, (*args, 0.5, 0.5, 1.0, 4, True, True))


def test_what_does_not_fit_is_named() -> None:
    x, w, x_teacher, w_teacher, labels = inputs(6, 5)
    with pytest.raises(JetExportError, match="student and teacher one vocabulary"):
        linear_kl(x, w, x_teacher, w_teacher[:-1], labels, kl_weight=1, ce_weight=1)
    with pytest.raises(JetExportError, match="temperature 0"):
        linear_kl(x, w, x_teacher, w_teacher, labels, kl_weight=1, ce_weight=1, temperature=0)
