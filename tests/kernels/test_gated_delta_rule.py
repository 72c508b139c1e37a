from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from helpers.compare import relative_error
from helpers.packed import Packed
from helpers.poison import poisoned
from helpers.rounded_chunk import rounded_chunk

from jet_export.kernels import gated_delta_rule_chunk
from jet_export.kernels.gated_delta_rule import (
    chunk_gated_delta_rule_ref,
    gated_delta_rule_ref,
    gated_delta_rule_triton,
    packed_gated_delta_rule_ref,
)
from jet_export.kernels.gated_delta_rule_chunk import unit_lower_inverse
from jet_export.kernels.state_layout import NO_BUFFER

LENS = [1, 2, 63, 64, 65, 200]


def one_sequence(T: int, K: int, V: int = 32, **kwargs) -> tuple:
    """q, k, v, beta, g, initial_state of a batch of one, fp64."""
    p = Packed([T], K=K, V=V, dtype=torch.float64, state_dtype=torch.float64, **kwargs)
    q, k, v, beta, g, state, _, slots, *_ = p.rule_args(False)
    return *(x[None] for x in (q, k, v, beta, g)), state[slots.long()]


def exact(p: Packed, decode: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """o and state pool in fp64, token by token."""
    q, k, v, beta, g, pool, cu, slots, context, _ = p.rule_args(decode, torch.float64)
    o = torch.zeros_like(v)
    for n, slot in enumerate(slots.tolist()):
        if slot >= 0:
            s = slice(int(cu[n]), int(cu[n + 1]))
            start = pool[slot : slot + 1] * (context[n] > 0)
            args = (q[None, s], k[None, s], v[None, s], beta[None, s], g[None, s], start)
            o[s], pool[slot] = (x[0] for x in gated_delta_rule_ref(*args))
    return o, pool


@pytest.fixture
def big_chunks(monkeypatch):
    """fp32 kernels with the chunks of the 16-bit ones: the interpreter is right in fp32 only."""
    config = gated_delta_rule_chunk.chunk_config
    monkeypatch.setattr(gated_delta_rule_chunk, "chunk_config", lambda dtype, K, V: config(torch.bfloat16, K, V))


# The references, by law


@pytest.mark.parametrize("T", LENS)
@pytest.mark.parametrize("K", [32, 96, 128])
def test_chunked_is_recurrent(T, K):
    args = one_sequence(T, K)
    for a, b in zip(chunk_gated_delta_rule_ref(*args), gated_delta_rule_ref(*args), strict=True):
        assert relative_error(a, b) < 1e-11


def test_chunked_gradient_is_recurrent_gradient():
    inputs = [x.requires_grad_() for x in one_sequence(70, 32)]
    grads = []
    for rule in (chunk_gated_delta_rule_ref, gated_delta_rule_ref):
        o, state = rule(*inputs)
        loss = (o * o.detach().cos()).sum() + (state * state.detach().sin()).sum()
        grads.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-9


def test_chunked_survives_fast_decay_and_equal_keys():
    q, k, v, beta, g, state = (x.float() for x in one_sequence(130, 32))
    k = k[:, :1].expand_as(k)
    g = torch.where(torch.arange(130)[None, :, None] % 7 == 3, -90.0, g * 1e-3)
    want = gated_delta_rule_ref(*(x.double() for x in (q, k, v, torch.ones_like(beta), g, state)))
    got = chunk_gated_delta_rule_ref(q, k, v, torch.ones_like(beta), g, state)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-4


# The kernels: equal to the reference, and the same laws


@triton.jit
def inverse_kernel(a, x, BT: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, BT)[:, None] * BT + tl.arange(0, BT)[None, :]
    tl.store(x + o, unit_lower_inverse(tl.load(a + o), BT, PRECISION))


@pytest.mark.parametrize("BT", [16, 32, 64])
@pytest.mark.parametrize("equal", [False, True], ids=["random", "ones"])
def test_unit_lower_inverse(device, BT, equal):
    """All ones is the hardest A there is: powers of it grow like binomials, its inverse does not."""
    r = torch.Generator().manual_seed(0)
    A = (torch.ones(BT, BT) if equal else torch.randn(BT, BT, generator=r) / 4).tril(-1).to(device)
    X = torch.full_like(A, torch.nan)
    inverse_kernel[(1,)](A, X, BT=BT, PRECISION="ieee")
    assert relative_error(X, torch.linalg.inv(torch.eye(BT, dtype=torch.float64) + A.double().cpu())) < 2e-6


@pytest.mark.parametrize("apart", [0.0, 0.1, 10.0], ids=["equal", "near", "random"])
@pytest.mark.parametrize("full", [False, True], ids=["beta", "beta 1"])
def test_the_inverse_of_keys_fits_fp16(device, apart, full):
    """No element exceeds 1, and the error is below that of the inverse's own rounding to bf16."""
    r = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 128, generator=r) + apart * torch.randn(64, 128, generator=r))
    beta = torch.ones(64) if full else torch.rand(64, generator=r)
    A = (beta[:, None] * (k @ k.T)).tril(-1).to(device)
    X = torch.full_like(A, torch.nan)
    inverse_kernel[(1,)](A, X, BT=64, PRECISION="fp16")
    assert X.abs().max() <= 1 + 2**-11
    assert relative_error(X, torch.linalg.inv(torch.eye(64, dtype=torch.float64) + A.double().cpu())) < 2**-9


@pytest.mark.parametrize("K, V", [(32, 64), (96, 48), (128, 32)])
def test_kernel_is_reference(device, K, V):
    p = Packed(LENS if K == 32 else [1, 20, 65], K=K, V=V, H=1, extra=8, device=device)
    want, want_state = exact(p)
    ref, got = p.rule_args(False), p.rule_args(False)
    o_ref = packed_gated_delta_rule_ref(*ref)
    with poisoned():
        o = gated_delta_rule_triton(*got)
    assert relative_error(o, want) <= relative_error(o_ref, want) + 1e-5
    assert relative_error(got[5], want_state) <= relative_error(ref[5], want_state) + 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for the 16-bit kernels, which run on a GPU")
@pytest.mark.parametrize("K, V", [(32, 80), (96, 64)])
def test_kernel_with_chunks_of_64_is_reference(device, big_chunks, K, V):
    p = Packed([1, 64, 65, 150], K=K, V=V, H=1, context=[5, 0, 5, 5], rows=[4, 2, -1, 0], device=device)
    want, want_state = exact(p)
    ref, got = p.rule_args(False), p.rule_args(False)
    o_ref = packed_gated_delta_rule_ref(*ref)
    with poisoned():
        o = gated_delta_rule_triton(*got)
    assert relative_error(o, want) <= relative_error(o_ref, want) + 1e-5
    assert relative_error(got[5], want_state) <= relative_error(ref[5], want_state) + 1e-5


@pytest.mark.parametrize("K, V", [(32, 64), (96, 40)])
def test_decode_is_reference_and_prefill(device, K, V):
    p = Packed([1] * 4, K=K, V=V, context=[1, 0, 5, 5], rows=[0, 4, 2, 5], device=device)
    want, want_state = exact(p, decode=True)
    decode, prefill = p.rule_args(True), p.rule_args(False)
    with poisoned():
        o, o_prefill = gated_delta_rule_triton(*decode), gated_delta_rule_triton(*prefill)
    for args, out in ((decode, o), (prefill, o_prefill)):
        assert relative_error(out, want) < 1e-5 and relative_error(args[5], want_state) < 1e-5


@pytest.mark.parametrize("split", [[1, 2, 3, 40], [17, 16, 13], [45, 1]])
@pytest.mark.parametrize("rule", [packed_gated_delta_rule_ref, gated_delta_rule_triton], ids=["ref", "kernel"])
def test_split_with_carried_state_is_whole(device, rule, split):
    p = Packed([46], context=[0], H=1, device=device)
    q, k, v, beta, g, state, cu, slots, context, _ = p.rule_args(False)
    whole_state = state.clone()
    whole = rule(q, k, v, beta, g, whole_state, cu, slots, context, False)
    parts, start = [], 0
    for n in split:
        bounds, held = torch.tensor([[0, n], [start, 0]], dtype=torch.int32, device=device)
        inputs = (x[start : start + n] for x in (q, k, v, beta, g))
        parts.append(rule(*inputs, state, bounds, slots, held[:1], n == 1))
        start += n
    assert relative_error(torch.cat(parts), whole) < 1e-5
    assert relative_error(state, whole_state) < 1e-5


@pytest.mark.blas
@pytest.mark.parametrize("rule", [packed_gated_delta_rule_ref, gated_delta_rule_triton], ids=["ref", "kernel"])
def test_packed_is_one_by_one_bit_for_bit(device, rule):
    on = "cpu" if rule is packed_gated_delta_rule_ref else device  # cuBLAS picks its kernels by shape
    p = Packed([3, 33, 1, 16], context=[5, 0, 2, 0], H=1, device=on)
    q, k, v, beta, g, state, cu, slots, context, _ = p.rule_args(False)
    packed_state = state.clone()
    packed = rule(q, k, v, beta, g, packed_state, cu, slots, context, False)
    for n, (s, e) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        bounds = torch.tensor([0, e - s], dtype=torch.int32, device=on)
        inputs = (x[s:e] for x in (q, k, v, beta, g))
        alone = rule(*inputs, state, bounds, slots[n : n + 1], context[n : n + 1], False)
        assert torch.equal(alone, packed[s:e])
    assert torch.equal(state, packed_state)


@pytest.mark.blas
def test_each_batch_is_served_by_one_form_of_the_scan(device, monkeypatch):
    """One form serves batches of up to 6 heads, the other the larger ones; both are the reference to fp32 rounding.

    Equal bits are required on a GPU only, below: a CPU's BLAS may sum products of another shape in another order."""
    config = gated_delta_rule_chunk.chunk_config
    forms: list[dict[str, Any]] = []

    def two_forms(dtype, K, V):
        prepare, (scan,) = config(dtype, K, V)
        forms[:] = [scan | {"BV": 16, "MAX_HEADS": 6}, scan | {"BV": 32, "MIN_HEADS": 7}]
        return prepare, [forms[0 if only is None else only]] if only is not None else forms

    monkeypatch.setattr(gated_delta_rule_chunk, "chunk_config", two_forms)
    p = Packed([17, 3, 40, 16], H=2, K=32, V=48, device=device)
    want, want_state = exact(p)
    for n, form in ((3, 0), (4, 1)):  # 6 heads, 8 heads
        results = {}
        for only in (None, form, 1 - form):
            q, k, v, beta, g, state, cu, slots, context, _ = p.rule_args(False)
            end, rows = int(cu[n]), slots[:n].long()
            tokens = (q[:end], k[:end], v[:end], beta[:end], g[:end])
            with poisoned():
                o = gated_delta_rule_triton(*tokens, state, cu[: n + 1], slots[:n], context[:n], False)
                results[only] = o, state
        o, state = results[None]
        assert relative_error(o, want[:end]) < 3e-6 and relative_error(state[rows], want_state[rows]) < 3e-6
        assert all(torch.equal(a, b) for a, b in zip(results[form], results[None], strict=True))
        o, state = results[1 - form]  # the other form writes nothing
        assert o.isnan().all() and torch.equal(state, p.recurrent_state)


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("rule", [packed_gated_delta_rule_ref, gated_delta_rule_triton], ids=["ref", "kernel"])
def test_padding_rows_are_inert_and_empty_context_is_zero_state(device, rule, decode):
    p = Packed([1, 1, 1] if decode else [2, 20, 3], context=[5, 0, 5], rows=[-1, 2, 0], H=1, device=device)
    q, k, v, beta, g, state, cu, *rest = p.rule_args(decode)
    end = int(cu[1])
    for x in (q, k, v, beta, g):
        x[:end] = torch.nan
    state[2], state[1], state[3] = torch.nan, 7.0, 8.0  # row 2 starts afresh: its old content must not count
    o = rule(q, k, v, beta, g, state, cu, *rest)
    assert torch.equal(o[:end], torch.zeros_like(o[:end]))
    assert o.isfinite().all() and state.isfinite().all()
    assert (state[1] == 7).all() and (state[3] == 8).all()


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_opcheck_with_strided_and_transposed_inputs(decode):
    p = Packed([1, 1] if decode else [2, 5], extra=8)
    args = p.rule_args(decode)
    assert not args[0].is_contiguous()
    torch.library.opcheck(torch.ops.jet.gated_delta_rule, (*args, *NO_BUFFER))
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in args[:5]]
    torch.library.opcheck(torch.ops.jet.gated_delta_rule, (*transposed, *p.rule_args(decode)[5:], *NO_BUFFER))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H, K, V", [(12, 96, 256), (16, 128, 256), (4, 256, 288), (4, 192, 384), (4, 128, 576),
                                     (4, 256, 144), (4, 64, 384), (4, 32, 64)])  # fmt: skip
def test_16_bit_error_is_that_of_the_rounded_chunk_form(H, K, V, dtype):
    """Error against fp64, a tenth allowed for the tensor cores' order of summation and TF32 block inverses."""
    p = Packed([1, 64, 333], H=H, K=K, V=V, context=[5, 0, 5], dtype=dtype, device="cuda")
    q, k, v, beta, g, pool, cu, slots, context, _ = p.rule_args(False)
    want, want_state = exact(p)
    got = p.rule_args(False)
    o = torch.ops.jet.gated_delta_rule(*got, *NO_BUFFER)
    o_rounded, rounded_state = torch.zeros_like(v), pool.clone()
    for n, slot in enumerate(slots.tolist()):
        s = slice(int(cu[n]), int(cu[n + 1]))
        inputs = (q[s], k[s], v[s], beta[s], g[s])
        o_n, rounded_state[slot] = rounded_chunk(*inputs, pool[slot] * (context[n] > 0), dtype)
        o_rounded[s] = o_n.to(dtype)
    assert relative_error(o, want) <= 1.1 * relative_error(o_rounded, want)
    rows = slots.long()
    assert relative_error(got[5][rows], want_state[rows]) <= 1.1 * relative_error(rounded_state[rows], want_state[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("H, K", [(12, 96), (16, 128)])
def test_a_sequence_has_the_same_bits_alone_and_among_many(H, K):
    """Alone it uses the scan's narrow tiles, among nine the wide ones, where the table has both (SM 9.0)."""
    max_heads = gated_delta_rule_chunk.chunk_config(torch.bfloat16, K, 256)[1][0]["MAX_HEADS"]
    assert max_heads == 0 or H <= max_heads < 9 * H
    p = Packed([130, 64, 333, 1, 65, 200, 64, 7, 100], H=H, K=K, V=256, dtype=torch.bfloat16, device="cuda")
    q, k, v, beta, g, state, cu, slots, context, _ = p.rule_args(False)
    alone_state = state.clone()
    o = torch.ops.jet.gated_delta_rule(q, k, v, beta, g, state, cu, slots, context, False, *NO_BUFFER)
    for n in (0, 2, 3):
        begin, end = cu[n : n + 2].tolist()
        one = (x[begin:end] for x in (q, k, v, beta, g))
        bounds = cu.new_tensor([0, end - begin])
        rest = (bounds, slots[n : n + 1], context[n : n + 1], False, *NO_BUFFER)
        alone = torch.ops.jet.gated_delta_rule(*one, alone_state, *rest)
        assert torch.equal(alone, o[begin:end]) and torch.equal(alone_state[slots[n]], state[slots[n]])


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_bf16_decode_is_one_rounding(state_dtype):
    p = Packed([1] * 9, H=16, K=128, V=256, dtype=torch.bfloat16, state_dtype=state_dtype, device="cuda")
    want, want_state = exact(p, decode=True)
    args = p.rule_args(True)
    o = torch.ops.jet.gated_delta_rule(*args, *NO_BUFFER)
    assert relative_error(o, want) <= 1.01 * relative_error(want.bfloat16(), want)
    assert relative_error(args[5], want_state) <= 1.01 * relative_error(want_state.to(state_dtype), want_state) + 1e-6
