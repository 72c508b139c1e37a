"""linear_kl: torch's losses and their gradients, whatever the chunk."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import relative_error
from helpers.poison import poisoned

from jet_export.kernels.linear_kl import kl_rows_torch, kl_rows_triton, linear_kl
from jet_export.utils.errors import JetExportError

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def inputs(T: int, V: int, dtype: torch.dtype = torch.float64) -> Any:
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
    want = plain(*[*args, 0.7, 0.2, temperature])
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-12
    grads = (torch.autograd.grad(3 * loss, args[:2]) for loss in (got[0], want[0]))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-12


def test_a_frozen_weight_has_no_gradient_and_x_has_the_same() -> None:
    args = inputs(10, 12)
    x, w = args[:2]
    both = torch.autograd.grad(linear_kl(*args, kl_weight=1, ce_weight=1)[0], (x, w))
    (alone,) = torch.autograd.grad(linear_kl(x, w.detach(), *args[2:], kl_weight=1, ce_weight=1)[0], x)
    assert torch.equal(alone, both[0])
    with torch.no_grad():
        assert not linear_kl(*args, kl_weight=1, ce_weight=1)[0].requires_grad


def test_without_labels_all_is_zero() -> None:
    x, w, x_teacher, w_teacher, labels = inputs(6, 5)
    nothing = torch.full_like(labels, -100)
    loss, kl, ce = linear_kl(x, w, x_teacher, w_teacher, nothing, kl_weight=1, ce_weight=1)
    assert loss == kl == ce == 0
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


def test_the_student_that_is_the_teacher_has_no_kl() -> None:
    x, w, _, _, labels = inputs(6, 5)
    loss, kl, _ = linear_kl(x, w, x, w, labels, kl_weight=1, ce_weight=0)
    assert abs(kl) < 1e-14 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-14


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kernel_is_within_fp32_of_the_exact_losses_and_gradients(device, temperature: float) -> None:
    """Rows wider than a block, logits far from zero, an ignored row; without a gradient z stays as it is."""
    r = torch.Generator().manual_seed(5)
    z, z_teacher = (30 * torch.randn(3, 37, generator=r) + 50 for _ in range(2))
    z_teacher[2] = z[2]
    labels, scales = torch.tensor([4, -100, 36]), torch.tensor([0.3, 0.1])
    want_kl, want_ce, want_dz = kl_rows_torch(z.double(), z_teacher.double(), labels, scales.double(), temperature)
    on: Any = [x.to(device) for x in (z, z_teacher, labels, scales)]
    dz = on[0].clone()
    with poisoned():
        kl, ce = kl_rows_triton(*[*on, temperature, False, 16])
        kl_too, _ = kl_rows_triton(*[dz, *on[1:], temperature, True, 16])
    assert torch.equal(on[0].cpu(), z) and torch.equal(kl, kl_too)
    for a, b in ((kl, want_kl), (ce, want_ce), (dz, want_dz)):
        assert relative_error(a, b) < 1e-5
    assert kl[1] == ce[1] == 0 and dz[1].eq(0).all()


def test_opcheck() -> None:
    args = inputs(6, 5, torch.float32)
    torch.library.opcheck(torch.ops.jet.linear_kl, (*args, 0.5, 0.5, 1.0, 4, True, True), test_utils=OPCHECKS)


def test_what_does_not_fit_is_named() -> None:
    x, w, x_teacher, w_teacher, labels = inputs(6, 5)
    with pytest.raises(JetExportError, match="student and teacher one vocabulary"):
        linear_kl(x, w, x_teacher, w_teacher[:-1], labels, kl_weight=1, ce_weight=1)
    with pytest.raises(JetExportError, match="temperature 0"):
        linear_kl(x, w, x_teacher, w_teacher, labels, kl_weight=1, ce_weight=1, temperature=0)


@pytest.mark.gpu
def test_bf16_over_a_large_vocabulary_is_torchs_in_fp64() -> None:
    """152K logits, whose bf16 rounding is the error there is; memory stays below a [T, V] tensor in bf16."""
    r = torch.Generator("cuda").manual_seed(0)
    T, V, d = 2048, 151936, 1536

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r, device="cuda").bfloat16()

    x, w, w_teacher = rand(T, d).requires_grad_(), rand(V, d) * 0.03, rand(V, d) * 0.03
    labels = torch.randint(0, V, (T,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, kl, ce = linear_kl(x, w, x.detach(), w_teacher, labels, kl_weight=1, ce_weight=1, chunk=256)
    (dx,) = torch.autograd.grad(loss, x)
    assert torch.cuda.max_memory_allocated() - before < T * V * 2
    part = slice(0, 64)
    exact = plain(x[part].double(), w.double(), x[part].double(), w_teacher.double(), labels[part], 1, 1, 1.0)
    some = linear_kl(x[part], w, x[part].detach(), w_teacher, labels[part], kl_weight=1, ce_weight=1)
    for a, b in zip(some, exact, strict=True):
        assert relative_error(a, b) < 1e-3
    assert dx.isfinite().all() and kl > 0 and ce > 0
