"""The gated delta rule in training: gradients against autograd through the token-by-token reference, and by law."""

from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.poison import poisoned
from helpers.train_compiler import compile_report
from torch import Tensor

from jet_export.kernels.gated_delta_rule import gated_delta_rule_ref
from jet_export.kernels.gated_delta_rule_chunk import chunk_delta_rule_triton
from jet_export.kernels.gated_delta_rule_torch import delta_rule_backward, delta_rule_forward
from jet_export.kernels.gated_delta_rule_train import (
    gated_delta_rule_train,
    rule_backward_triton,
    rule_forward_triton,
)
from jet_export.utils.errors import JetExportError

NAMES = ("q", "k", "v", "beta", "g", "initial_state")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
PAPER = [(4, 256, 288), (4, 192, 384), (4, 128, 576), (8, 256, 144), (8, 192, 192), (8, 128, 288), (12, 128, 192),
         (12, 96, 256), (12, 64, 384)]  # fmt: skip


def inputs(
    lens: list[int], H: int, K: int, V: int, dtype: torch.dtype = torch.float64, seed: int = 0, device="cpu"
) -> Any:
    """q, k, v, beta, g, initial_state, cu_seqlens, and gradients of o and the final state."""
    r = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    T, N = sum(lens), len(lens)
    decay = -torch.rand(T, H, generator=r, dtype=torch.float64) * torch.logspace(-3, 1, H, dtype=torch.float64)
    cu = torch.tensor([0, *lens]).cumsum(0).int().to(device)
    low = [rand(T, H, K), rand(T, H, K), rand(T, H, V), rand(T, H).sigmoid()]
    full = [decay, rand(N, H, K, V)]
    fp32 = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype).to(device) for x in low] + [x.to(fp32).to(device) for x in full]
    return leaves, cu, (rand(T, H, V).to(dtype).to(device), rand(N, H, K, V).to(fp32).to(device))


def by_reference(leaves: Any, cu: Tensor) -> tuple[Tensor, Tensor]:
    outs, finals = [], []
    for n, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        tokens, state = leaves[:5], leaves[5]
        these: Any = [x[None, begin:end] for x in tokens]
        o, final = gated_delta_rule_ref(*[*these, state[n : n + 1]])
        outs.append(o[0])
        finals.append(final)
    return torch.cat(outs), torch.cat(finals)


def trained(leaves: Any, cu: Tensor) -> tuple[Tensor, Tensor]:
    tokens, state = leaves[:5], leaves[5]
    return gated_delta_rule_train(*[*tokens, cu, state])


@pytest.mark.parametrize("K", [32, 96, 128])
def test_gradients_are_those_of_the_recurrence(K: int) -> None:
    leaves, cu, d = inputs([1, 2, 63, 64, 65, 130], 2, K, 16)
    leaves = [x.requires_grad_() for x in leaves]
    got, want = trained(leaves, cu), by_reference(leaves, cu)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-12
    for a, b in zip(torch.autograd.grad(got, leaves, d), torch.autograd.grad(want, leaves, d), strict=True):
        assert relative_error(a, b) < 1e-11


def test_fast_decay_equal_keys_and_beta_of_0_and_1_stay_exact_in_fp32() -> None:
    leaves, cu, d = inputs([130], 2, 32, 16)
    q, k, v, beta, g, state = leaves
    t = torch.arange(130)[:, None]
    cases = [k[:1].expand_as(k), (t % 3 > 0).double().expand_as(beta), torch.where(t % 7 == 3, -90.0, g * 1e-3)]
    hard = [x.clone().requires_grad_() for x in (q, cases[0], v, cases[1], cases[2], state)]
    want = torch.autograd.grad(by_reference(hard, cu), hard, d)
    single = [x.detach().float().requires_grad_() for x in hard]
    got = torch.autograd.grad(trained(single, cu), single, [x.float() for x in d])
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert relative_error(a, b) < 1e-4, name


@pytest.mark.parametrize("at", [1, 40, 64])
def test_split_with_carried_state_is_whole_with_its_gradients(at: int) -> None:
    leaves, cu, d = inputs([100], 2, 16, 8)
    for x in leaves:
        x.requires_grad_()
    before, after = [x[:at] for x in leaves[:5]], [x[at:] for x in leaves[:5]]
    first, mid = trained([*before, leaves[5]], cu.new_tensor([0, at]))
    second, final = trained([*after, mid], cu.new_tensor([0, 100 - at]))
    parts, whole = (torch.cat([first, second]), final), trained(leaves, cu)
    for a, b in zip(torch.autograd.grad(parts, leaves, d), torch.autograd.grad(whole, leaves, d), strict=True):
        assert relative_error(a, b) < 1e-11


def test_an_empty_sequence_hands_its_state_on() -> None:
    leaves, _, d = inputs([3, 4], 2, 8, 4)
    cu = torch.tensor([0, 0, 7], dtype=torch.int32)
    leaves[5].requires_grad_()
    o, final = trained(leaves, cu)
    assert torch.equal(final[0], leaves[5][0]) and o.isfinite().all()
    (d_initial,) = torch.autograd.grad((o, final), leaves[5], d)
    assert torch.equal(d_initial[0], d[1][0])


def test_without_decay_it_is_the_delta_rule() -> None:
    leaves, cu, _ = inputs([5, 70], 2, 16, 8)
    q, k, v, beta, g, _ = leaves
    plain, _ = gated_delta_rule_train(q, k, v, beta, None, cu)
    assert torch.equal(plain, gated_delta_rule_train(q, k, v, beta, torch.zeros_like(g), cu)[0])
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    assert relative_error(gated_delta_rule_train(q, k, v, beta, None, cu, l2=False)[0], plain) < 1e-5


def test_rounded_operands_cost_no_more_than_bf16_does() -> None:
    """The rounding points of the 16-bit kernels: each gradient's error is that of a few roundings to 8 bits."""
    leaves, cu, d = inputs([200, 65], 3, 96, 64)
    tokens, state = leaves[:5], leaves[5]
    exact, rounded = (delta_rule_forward(*[*tokens, cu, state], mma_dtype=x) for x in (None, torch.bfloat16))
    want = delta_rule_backward(exact, *tokens[:2], *d)
    got = delta_rule_backward(rounded, *tokens[:2], *d, mma_dtype=torch.bfloat16)
    assert 2**-12 < relative_error(rounded.o, exact.o) < 4 * 2**-9
    for name in NAMES:
        assert 2**-12 < relative_error(getattr(got, name), getattr(want, name)) < 4 * 2**-9, name


def test_kernels_are_within_fp32_of_the_exact_gradients(device) -> None:
    """Without normalisation, decaying states or a gradient of the last; test_jet_block_train.py has them with."""
    leaves, cu, d = inputs([1, 18], 1, 40, 16, torch.float32, device=device)
    leaves[1] = leaves[1] / leaves[1].norm(dim=-1, keepdim=True)
    tokens = leaves[:5]
    exact: Any = [x.double().cpu() for x in (*tokens, d[0])]
    rule = delta_rule_forward(*[*exact[:5], cu.cpu()], l2=False)
    want = delta_rule_backward(rule, *[*exact[:2], exact[5], None], l2=False)
    with poisoned():
        o, final = rule_forward_triton(*[*tokens, cu, None, False])
        *got, nothing = rule_backward_triton(*[*tokens, cu, None, False, d[0], None])
    assert relative_error(o, rule.o) < 1e-5 and relative_error(final, rule.final_state) < 1e-5
    for name, a in zip(NAMES[:5], got, strict=True):
        assert relative_error(a, getattr(want, name)) < 1e-5, name
    assert nothing.numel() == 0


def compare_with_rounded_form(leaves: Any, cu: Tensor, d: Any) -> list[Tensor]:
    """Asserts that results and gradients are as near to fp64 as the torch form's that rounds where the kernels round, a
    tenth allowed for the order of summation and TF32 in the blocks' inverses; returns the gradients. g's error is
    mostly that of a single number a chunk, <S, dS'>, and varies more: half is allowed."""
    tokens, state, dtype = leaves[:5], leaves[5], leaves[0].dtype
    exact: Any = [x.double() for x in (*leaves, *d)]
    rounded: Any = [x.float() for x in tokens]
    rule = delta_rule_forward(*[*exact[:5], cu, exact[5]])
    want = delta_rule_backward(rule, *exact[:2], *exact[6:])
    low = delta_rule_forward(*[*rounded, cu, state], mma_dtype=dtype)
    same = delta_rule_backward(low, *[*rounded[:2], d[0].float(), d[1]], mma_dtype=dtype)
    with poisoned():
        o, final = rule_forward_triton(*[*tokens, cu, state, True])
        gradients = rule_backward_triton(*[*tokens, cu, state, True, *d])
    rows = [("o", o, low.o, rule.o), ("final", final, low.final_state, rule.final_state)]
    rows += [(n, x, getattr(same, n), getattr(want, n)) for n, x in zip(NAMES, gradients, strict=True)]
    for name, got, bound, exactly in rows:
        allowed = 1.5 if name == "g" else 1.1
        assert relative_error(got, exactly) <= allowed * relative_error(bound.to(got.dtype), exactly), name
    return list(gradients)


def test_16_bit_kernels_are_as_good_as_the_rounded_chunk_form(device) -> None:
    """fp16, which the interpreter computes as a GPU does (bf16 it does not), in chunks of 64."""
    compare_with_rounded_form(*inputs([70], 1, 24, 20, torch.float16, device=device))


def test_opcheck() -> None:
    leaves, cu, _ = inputs([2, 5], 2, 8, 4, torch.float32)
    q, k, v, beta, g, state = (x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in leaves)
    torch.library.opcheck(
        torch.ops.jet.gated_delta_rule_train, (q, k, v, beta, g, cu, state, True), test_utils=OPCHECKS
    )


def test_shapes_that_do_not_fit_are_named() -> None:
    leaves, cu, _ = inputs([2, 5], 2, 8, 4)
    tokens, state = leaves[:5], leaves[5]
    with pytest.raises(JetExportError, match="without a batch axis"):
        gated_delta_rule_train(tokens[0], tokens[1], tokens[2][:5], tokens[3], tokens[4], cu)
    with pytest.raises(JetExportError, match=r"It is \[N, H, K, V\], here \(2, 2, 8, 4\)"):
        trained([*tokens, state[:1]], cu)
    with pytest.raises(JetExportError, match=r"q, k and v are torch.float64, torch.float64, torch.float32"):
        trained([*tokens[:2], tokens[2].float(), *tokens[3:], state], cu)
    with pytest.raises(JetExportError, match="heads of K up to 256, not 272"):
        rule_forward_triton(*[*inputs([3], 1, 272, 4, torch.float32)[0][:5], cu[:2], None, True])


@pytest.mark.parametrize(
    "cases",
    [["linear_kl", "12x96x256"], pytest.param(["4x256x288", "4x192x384", "4x128x576"], marks=pytest.mark.slow)],
    ids=["jet-2b", "largest"],
)
def test_kernels_fit_sm_90(cases: list[str]) -> None:
    """Compiled ahead of time, for jet_block_train's backward pass and linear_kl: within Hopper's shared memory, and
    without the transposes in registers that Triton 3.4 to 3.7 computes wrongly as operands of products (fla#640)."""
    report = compile_report(cases)
    assert len(report) == sum(1 if case == "linear_kl" else 9 for case in cases)
    for kernel in report:
        assert kernel["shared"] <= 227 * 1024 and kernel["scratch"] == kernel["f64"] == 0, kernel
        assert kernel["transposed"] == 0, kernel


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "H, K, V, dtype", [*((*shape, torch.bfloat16) for shape in PAPER), (16, 128, 256, torch.float16)], ids=str
)
def test_every_shape_is_as_good_as_the_rounded_chunk_form_and_repeats(
    H: int, K: int, V: int, dtype: torch.dtype
) -> None:
    """Triton 3.4 to 3.7 computes products of transposed accumulators wrongly on Hopper (fla#640): by much, or by
    reading what is not there, so that results vary from call to call."""
    for seed in range(3):
        leaves, cu, d = inputs([1, 64, 333, 130], H, K, V, dtype, seed=seed, device="cuda")
        first = compare_with_rounded_form(leaves, cu, d)
        for _ in range(3):
            again = rule_backward_triton(*[*leaves[:5], cu, leaves[5], True, *d])
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("H, K, V", PAPER)
def test_forward_is_the_inference_op(H: int, K: int, V: int) -> None:
    leaves, cu, _ = inputs([64, 333], H, K, V, torch.bfloat16, device="cuda")
    tokens, state = leaves[:5], leaves[5]
    o, final = rule_forward_triton(*[*tokens, cu, state, True])
    N = torch.arange(2, device="cuda", dtype=torch.int32)
    pool = state.clone()
    want = chunk_delta_rule_triton(*[*tokens, pool, cu, N, torch.ones_like(N), (H, K, V)])
    assert relative_error(o, want) < 2**-7 and relative_error(final, pool) < 2**-7
