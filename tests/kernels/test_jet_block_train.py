"""jet_block_train: the inference op's outputs, its reference's gradients, and torch's ways of using them."""

from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.packed import Packed
from helpers.poison import poisoned
from torch.utils.checkpoint import checkpoint

from jet_export.kernels.form import Form
from jet_export.kernels.gated_delta_rule import chunk_gated_delta_rule_ref
from jet_export.kernels.gated_rms_norm import gated_rms_norm_ref
from jet_export.kernels.jet_block import jet_block_ref
from jet_export.kernels.jet_block_backward import (
    Block,
    Dims,
    backward_torch,
    backward_triton,
    forward_torch,
    forward_triton,
)
from jet_export.kernels.jet_block_train import jet_block_train
from jet_export.utils.errors import JetExportError

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
LENS = [1, 2, 5, 64, 65]


def inputs(lens: list[int], dtype: torch.dtype = torch.float64, **kwargs) -> Any:
    """qkuz, ba, kappa, A_log, dt_bias, w_o, initial_state as leaves, and cu_seqlens with the sizes."""
    p = Packed(lens, extra=3, **{"K": 8, "V": 16, "W": 4, "dtype": torch.float64, **kwargs})
    state = p.recurrent_state[: len(lens)]
    leaves = [p.qkuz, p.ba, p.kappa, p.A_log, p.dt_bias, p.w_o, state]
    return [x.to(dtype).requires_grad_() for x in leaves], (p.cu_seqlens, p.H, p.K, p.V, 1e-5)


def outputs(leaves: Any, rest: Any) -> Any:
    return jet_block_train(*leaves[:6], *rest, initial_state=leaves[6], return_final=True)


def one_by_one(leaves: Any, rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence by the inference references, which autograd differentiates."""
    qkuz, ba, kappa, A_log, dt_bias, w_o, state = leaves
    cu, H, K, V, eps = rest
    outs, finals = [], []
    for n, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        t = slice(begin, end)
        q, k, u, z = qkuz[t, : 2 * H * K + 2 * H * V].split([H * K, H * K, H * V, H * V], -1)
        taps = kappa[t].view(end - begin, H * V, -1)
        W = taps.shape[2]
        padded = torch.nn.functional.pad(u, (0, 0, W - 1, 0)).unfold(0, W, 1)  # [T, D, W]
        v = torch.nn.functional.silu((taps * padded).sum(-1)).unflatten(-1, (H, V))
        b, a = ba[t].chunk(2, -1)
        g = -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)
        q, k = (torch.nn.functional.silu(x).unflatten(-1, (H, K))[None] for x in (q, k))
        o, final = chunk_gated_delta_rule_ref(q, k, v[None], b.sigmoid()[None], g[None], state[n : n + 1])
        outs.append(gated_rms_norm_ref(o[0], w_o, z.unflatten(-1, (H, V)), eps).flatten(1))
        finals.append(final)
    return torch.cat(outs), torch.cat(finals)


def gradients(results: tuple[torch.Tensor, ...], leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    r = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=r, dtype=torch.float64).to(x) for x in results]
    return torch.autograd.grad(results, leaves, weights)


def test_is_the_inference_reference_and_its_gradient() -> None:
    leaves, rest = inputs(LENS)
    got, want = outputs(leaves, rest), one_by_one(leaves, rest)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-12
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert relative_error(a, b) < 1e-11


def test_output_is_that_of_the_inference_op_from_empty_states() -> None:
    p = Packed(LENS, context=[0] * len(LENS), rows=list(range(len(LENS))))
    want = jet_block_ref(*p.block_args(Form.PREFILL))
    got: Any = jet_block_train(p.qkuz, p.ba, p.kappa, p.A_log, p.dt_bias, p.w_o, p.cu_seqlens, p.H, p.K, p.V, 1e-5)
    assert relative_error(got, want) < 1e-6


def test_gradcheck() -> None:
    leaves, rest = inputs([1, 3], K=3, V=4, H=1, W=2)
    assert torch.autograd.gradcheck(lambda *x: outputs(list(x), rest), leaves, fast_mode=True)


@pytest.mark.blas
def test_nothing_crosses_from_one_sequence_into_another() -> None:
    """Other tokens of the other sequences change neither a sequence's results nor its gradients, bit for bit."""
    leaves, rest = inputs([4, 7, 3], torch.float32)
    changed = [x.detach().clone() for x in leaves]
    for x in changed[:3]:
        x[:4] = torch.randn_like(x[:4])
        x[11:] = torch.randn_like(x[11:])
    changed = [x.requires_grad_() for x in changed]
    found = []
    for these in (leaves, changed):
        out, _ = outputs(these, rest)
        d = torch.autograd.grad(out.square().sum(), these[:3])
        found.append([x[4:11] for x in (out, *d)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_gives_the_same_gradients() -> None:
    leaves, rest = inputs([9, 70], torch.float32)
    plain = gradients(outputs(leaves, rest), leaves)
    again = gradients(checkpoint(lambda *x: outputs(list(x), rest), *leaves, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_no_initial_state_is_a_zero_one_and_gradients_are_optional() -> None:
    leaves, rest = inputs([5, 2], torch.float32)
    zero = torch.zeros_like(leaves[-1])
    out: Any = jet_block_train(*leaves[:-1], *rest)
    want, _ = outputs([*leaves[:-1], zero], rest)
    assert torch.equal(out, want)
    (d,) = torch.autograd.grad(out.sum(), leaves[0])
    assert d[:, -3:].eq(0).all() and d[:, :-3].ne(0).any(0).all()  # columns beyond the gate are ignored


def test_kernels_are_within_fp32_of_the_exact_gradients(device) -> None:
    """Both passes; the rows of qkuz have ignored columns, whose gradient is zero."""
    leaves, (cu, H, K, V, eps) = inputs([1, 18], torch.float32, H=1)
    r = torch.Generator().manual_seed(3)
    dout, d_final = torch.randn(19, H * V, generator=r), torch.randn(2, H, K, V, generator=r)

    def block(x: Any, to: torch.device, dtype: torch.dtype) -> Block:
        x = [y.detach().to(dtype).to(to) for y in x]
        return Block(*[*x[:6], cu.to(to), x[6], Dims(H, K, V), eps])

    exact = block(leaves, torch.device("cpu"), torch.float64)
    want = *forward_torch(exact), *backward_torch(exact, dout.double(), d_final.double())
    with poisoned():
        x = block(leaves, device, torch.float32)
        got = *forward_triton(x), *backward_triton(x, dout.to(device), d_final.to(device))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert relative_error(a, b) < 1e-5, i


def test_compiles_into_one_graph() -> None:
    leaves, rest = inputs([4, 3], torch.float32)
    compiled = torch.compile(lambda *x: outputs(list(x), rest)[0].square(), fullgraph=True, backend="aot_eager")
    plain = outputs(leaves, rest)[0].square()
    for a, b in zip(*(torch.autograd.grad(f.sum(), leaves) for f in (compiled(*leaves), plain)), strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    leaves, rest = inputs([2, 5], torch.float32)
    cu, sizes = rest[0], rest[1:]
    leaves[0] = leaves[0].detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(torch.ops.jet.jet_block_train, (*leaves[:6], cu, leaves[6], *sizes), test_utils=OPCHECKS)


@pytest.mark.parametrize("name, index", [("ba", 1), ("kappa", 2), ("w_o", 5), ("initial_state", 6)])
def test_shapes_that_do_not_fit_are_named(name: str, index: int) -> None:
    leaves, rest = inputs([2, 3])
    leaves[index] = leaves[index][..., :-1]
    with pytest.raises(JetExportError, match=f"jet_block_train: {name} does not fit 2 heads of K 8 and V 16"):
        outputs(leaves, rest)


def test_bounds_that_do_not_end_at_the_tokens_are_refused() -> None:
    leaves, rest = inputs([2, 3])
    cu, sizes = rest[0], rest[1:]
    with pytest.raises(JetExportError, match=r"cu_seqlens runs 0 \.\.\. 4 over 5 tokens"):
        jet_block_train(*[*leaves[:6], cu.clamp(max=4), *sizes])


# On a GPU


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_right_and_repeats() -> None:
    """jet-2b's heads, against fp64: errors of a few roundings to 8 bits, and the same bits again."""
    leaves, (cu, H, K, V, eps) = inputs([64, 333, 1], torch.bfloat16, H=12, K=96, V=256, device="cuda")
    dout = torch.randn(398, H * V, device="cuda", dtype=torch.bfloat16)
    d_final = torch.randn(3, H, K, V, device="cuda")

    def block(dtype: torch.dtype) -> Block:
        x: Any = [y.detach().to(dtype) for y in leaves]
        return Block(*[*x[:6], cu, leaves[6].detach().float(), Dims(H, K, V), eps])

    exact = backward_torch(block(torch.float64), dout.double(), d_final.double())
    x = block(torch.bfloat16)
    got = backward_triton(x, dout, d_final)
    for name, a, b in zip(("qkuz", "ba", "kappa", "A_log", "dt_bias", "w_o", "state"), got, exact, strict=True):
        # the gates' hang on one rounded number a chunk, <S, dS'>
        assert relative_error(a, b) < (2**-4 if name in ("ba", "A_log", "dt_bias") else 2**-6), name
    again = backward_triton(x, dout, d_final)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    out, _ = forward_triton(x)
    assert relative_error(out, forward_torch(block(torch.float64))[0]) < 2**-7
