"""The Hopper form of the gated delta rule's prefill: what it compiles to, and its laws on a GPU of SM 9.0.

A wrong barrier would hang there: benchmarks/kernels/hopper_delta_rule.py --check runs it under a timeout first."""

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import gluon_on_cpu
from helpers.compare import relative_error
from helpers.gluon_on_cpu import hopper_on_cpu
from helpers.hopper_compiler import compile_report
from helpers.packed import Packed
from helpers.poison import poisoned
from helpers.rounded_chunk import rounded_chunk

from jet_export.kernels.form import Form
from jet_export.kernels.gated_delta_rule import packed_gated_delta_rule_ref
from jet_export.kernels.gated_delta_rule_chunk import chunk_delta_rule_triton
from jet_export.kernels.hopper_gated_delta_rule import NARROW, WIDE, form_for, hopper_delta_rule
from jet_export.utils.errors import JetExportError

BLOCK_SHARED = 227 * 1024  # of a program, on SM 9.0
FORMS = pytest.mark.parametrize("form", [WIDE, NARROW], ids=["wide", "narrow"])
RAGGED: dict[str, Any] = {
    "lens": [1, 64, 65, 300, 7, 128],
    "context": [5, 0, 5, 5, 0, 5],
    "rows": [7, 2, 0, 5, -1, 3],
}


@pytest.fixture
def device() -> Iterator[str]:
    """A GPU of SM 9.0; elsewhere the kernel's code runs on the CPU."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        yield "cuda"
    else:
        with hopper_on_cpu():
            yield "cpu"


@pytest.mark.skipif(
    importlib.util.find_spec("triton.experimental.gluon") is None, reason="this Triton has no Gluon, 3.6 has"
)
def test_it_compiles_without_spills_and_with_products_in_flight():
    """At most 16 bytes of stack, of addresses read once a chunk; ptxas serialises wgmma where it lacks registers."""
    for entry in compile_report(["wide-bfloat16-32-16-128-raw", "narrow-float16-16-16-256-plain"]):
        assert entry["stack"] <= 16 and entry["shared"] <= BLOCK_SHARED and entry["scratch"] == 0
        assert entry["registers"] == 168  # three warpgroups share 64 Ki
        assert entry["wgmma"] == 96 and not entry["warnings"]


def test_it_takes_what_the_portable_form_takes():
    ours, theirs = (dict(inspect.signature(f).parameters) for f in (hopper_delta_rule, chunk_delta_rule_triton))
    del ours["form"]
    assert list(ours.values()) == list(theirs.values())


def test_few_heads_run_in_narrow_programs():
    assert form_for(32, 128, 132) is NARROW and form_for(16, 256, 132) is NARROW
    assert form_for(512, 128, 132) is WIDE and form_for(67, 128, 132) is WIDE
    assert form_for(512, 192, 132) is NARROW  # V 192 is no multiple of 128


@pytest.mark.parametrize(
    "sizes, why",
    [
        ({"K": 96, "V": 128}, "K 96 and V 128: it has K 128 and V a multiple of 64"),
        ({"K": 128, "V": 96}, "K 128 and V 96"),
        ({"K": 128, "V": 128, "dtype": torch.float32}, "q is torch.float32, not bfloat16 or float16"),
        ({"K": 128, "V": 128, "extra": 8}, "the rows of q are not aligned to 32 bytes"),
        ({"K": 128, "V": 128}, "it is for a GPU of SM 9.0"),
    ],
)
def test_what_it_does_not_serve_is_said(sizes, why):
    p = Packed([3], **{"dtype": torch.bfloat16, **sizes})
    *args, _ = p.rule_args(False)
    launch: Any = hopper_delta_rule
    with pytest.raises(JetExportError, match=f"hopper_delta_rule: {why}.*Use chunk_delta_rule_triton"):
        launch(*args, head_dims=(p.H, p.K, p.V))


def test_a_triton_without_gluon_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "jet_export.kernels.hopper_gated_delta_rule_kernel", None)
    p = Packed([3], K=128, V=128, dtype=torch.bfloat16)
    *args, _ = p.rule_args(False)
    launch: Any = hopper_delta_rule
    with pytest.raises(JetExportError, match=r"has no Gluon for Hopper, which 3\.6 has.*Use chunk_delta_rule_triton"):
        launch(*args, head_dims=(p.H, p.K, p.V))


def packed(device: str, H: int, HK: int, V: int, dtype: torch.dtype = torch.bfloat16) -> Packed:
    return Packed(H=H, K=128, V=V, key_heads=HK, dtype=dtype, device=device, extra=16, **RAGGED)


def run(p: Packed, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the states after it."""
    q, k, v, beta, g, pool, *sequences, _ = p.rule_args(False)
    with poisoned():
        launch: Any = hopper_delta_rule
        o = launch(q, k, v, beta, g, pool, *sequences, (p.H, p.K, p.V), key_heads=p.key_heads, **options)
    return o, pool


def rounded(inputs: Any, p: Packed, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the states, sequence by sequence, by a chunk form in torch with the kernels' roundings."""
    q, k, v, beta, g, pool, cu, slots, context, _ = inputs
    o = torch.zeros_like(v)
    for n, slot in enumerate(slots.tolist()):
        s = slice(int(cu[n]), int(cu[n + 1]))
        if slot >= 0:
            q_n, k_n = (x[s].repeat_interleave(p.H // p.key_heads, 1) for x in (q, k))
            start = pool[slot] * (context[n] > 0)
            o[s], pool[slot] = rounded_chunk(q_n, k_n, v[s], beta[s], g[s], start, dtype)
    return o.to(dtype), pool


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H, HK, V", [(4, 2, 128), (2, 2, 256)])
def test_errors_are_those_of_the_rounded_chunk_form(device, H, HK, V, dtype, form):
    """Ragged sequences with tails, held states, a padding row, shared key heads."""
    p = packed(device, H, HK, V, dtype)
    exact = p.rule_args(Form.PREFILL, torch.float64)
    want = packed_gated_delta_rule_ref(*exact)
    o, pool = run(p, form=form)
    o_rounded, pool_rounded = rounded(p.rule_args(False), p, dtype)
    assert relative_error(o, want) <= 1.1 * relative_error(o_rounded, want)
    assert relative_error(pool, exact[5]) <= 1.1 * relative_error(pool_rounded, exact[5])


@FORMS
def test_raw_gates_and_silu_have_no_larger_errors(device, form):
    """All read from a block's projections, at their columns."""
    p = packed(device, 4, 2, 128)
    state, where = p.recurrent_state.clone(), (0, 2 * p.K, 4 * p.K, p.H)
    sequences = state, p.cu_seqlens, p.slots, p.context_lens
    o = hopper_delta_rule(
        p.qkuz, p.qkuz, p.qkuz, p.ba, p.ba, *sequences, (p.H, p.K, p.V), where, (p.A_log, p.dt_bias), key_heads=2,
        silu=True, form=form,
    )  # fmt: skip
    q, k, v, _, _, pool, *rest = p.rule_args(Form.PREFILL, torch.float64)
    b, a = p.ba.double().split(p.H, -1)
    g = -p.A_log.double().exp() * F.softplus(a + p.dt_bias.double())
    exact: Any = F.silu(q), F.silu(k), v, b.sigmoid(), g, pool, *rest
    near = [x.float() if x.is_floating_point() else x for x in exact[:-1]]
    near[3] = near[3].bfloat16()
    o_rounded, pool_rounded = rounded((*near, None), p, torch.bfloat16)
    want = packed_gated_delta_rule_ref(*exact)
    assert relative_error(o, want) <= 1.1 * relative_error(o_rounded, want)
    assert relative_error(state, pool) <= 1.1 * relative_error(pool_rounded, pool)


def test_both_forms_and_a_sequence_alone_have_the_same_bits(device):
    p = packed(device, 2, 1, 256)
    (o, pool), (o_narrow, pool_narrow) = (run(p, form=form) for form in (WIDE, NARROW))
    assert torch.equal(o, o_narrow) and torch.equal(pool, pool_narrow)
    q, k, v, beta, g, state, cu, slots, context, _ = p.rule_args(False)
    for n in (0, 3, 5):
        begin, end = cu[n : n + 2].tolist()
        q_n, k_n, v_n, beta_n, g_n = (x[begin:end] for x in (q, k, v, beta, g))
        sequence = state, cu.new_tensor([0, end - begin]), slots[n : n + 1], context[n : n + 1]
        alone = hopper_delta_rule(q_n, k_n, v_n, beta_n, g_n, *sequence, (2, 128, 256), key_heads=1, form=WIDE)
        assert torch.equal(alone, o[begin:end]) and torch.equal(state[slots[n]], pool[slots[n]])


@FORMS
def test_padding_is_inert_and_an_empty_context_is_a_zero_state(device, form):
    p = packed(device, 2, 2, 128)
    pad = slice(int(p.cu_seqlens[4]), int(p.cu_seqlens[5]))
    p.qkuz[pad], p.ba[pad] = torch.nan, torch.nan
    p.recurrent_state[2] = torch.nan  # context_lens says that nothing is held there
    before = p.recurrent_state.clone()
    o, pool = run(p, form=form)
    assert o.isfinite().all() and not o[pad].any()
    unused = [s for s in range(len(pool)) if s not in RAGGED["rows"]]
    assert unused and torch.equal(pool[unused], before[unused]) and pool.isfinite().all()


@FORMS
def test_mixed_leaves_out_sequences_of_one_token(device, form):
    p = packed(device, 2, 2, 128)
    (o, pool), (o_mixed, pool_mixed) = (run(p, form=form, mixed=mixed) for mixed in (False, True))
    assert torch.equal(o_mixed[1:], o[1:])
    assert torch.equal(pool_mixed[7], p.recurrent_state[7]) and not torch.equal(pool[7], pool_mixed[7])
    assert torch.equal(pool_mixed[:7], pool[:7])


def test_a_barrier_that_nobody_completes_is_seen(monkeypatch):
    """The stand-in for the GPU fails where the kernel would hang: with one arrival too few."""
    monkeypatch.setattr(gluon_on_cpu, "SECONDS", 1)
    init = gluon_on_cpu.Barriers.init
    monkeypatch.setattr(gluon_on_cpu.Barriers, "init", lambda self, bar, count: init(self, bar, count + 1))
    with hopper_on_cpu(), pytest.raises(TimeoutError, match="a barrier that nobody completes"):
        run(packed("cpu", 2, 2, 128), form=WIDE)
