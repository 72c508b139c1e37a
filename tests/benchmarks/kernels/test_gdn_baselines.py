"""FLA and FlashInfer are called by their conventions: stand-ins by their docstrings, in fp64, give our result."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.scripts import load_script

from jet_export.kernels.form import Form
from jet_export.kernels.jet_block import key_heads
from jet_export.kernels.state_layout import NO_BUFFER

SMALL = (4, 16, 16, 2, True)  # H, K = V, as FlashInfer wants it, HK


@pytest.fixture
def gdn(monkeypatch):
    """The script, with a model of the size above, on the CPU."""
    script = load_script("kernels/gated_delta_net.py")
    monkeypatch.setitem(script.MODELS, "small", type(script.MODELS["2b"])(*SMALL))
    monkeypatch.setattr(script, "block_inputs", partial(script.block_inputs, device="cpu"))
    return script


def recurrence(q, k, v, decay, beta, scale, state):
    """One token after the other; q, k [N, T, HK, K], v [N, T, H, V], decay and beta [N, T, H], state [N, H, K, V]."""
    q, k, v, decay, beta, state = (x.double() for x in (q, k, v, decay, beta, state))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    out = []
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, None, None]
        held = torch.einsum("nhkv,nhk->nhv", state, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - held)
        state = state + torch.einsum("nhk,nhv->nhkv", k[:, t], change)
        out.append(torch.einsum("nhkv,nhk->nhv", state, q[:, t] * scale))
    return torch.stack(out, 1), state


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    """FLA: g in log space, states [N, H, K, V], nothing normalised unless asked for."""
    assert output_final_state
    return recurrence(q, k, v, g.exp(), beta, scale or q.shape[-1] ** -0.5, initial_state)


def fused_recurrent_gated_delta_rule(
    q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False,
):  # fmt: skip
    assert use_qk_l2norm_in_kernel
    q, k = (F.normalize(x, dim=-1) for x in (q, k))
    return chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state)


def flashinfer_chunk(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
    use_qk_l2norm_in_kernel=False, output=None, output_state=None,
):  # fmt: skip
    """Packed; g is the factor alpha, states are [N, H, V, K], and both results go where the caller says."""
    assert cu_seqlens.dtype == torch.int64 and initial_state.is_contiguous() and output_final_state
    assert all(x.is_contiguous() for x in (q, k, v, g, beta))
    q, k, v, g, beta = (x.unflatten(0, (len(cu_seqlens) - 1, -1)) for x in (q, k, v, g, beta))
    o, state = recurrence(q, k, v, g, beta, scale, initial_state.mT)
    return output.copy_(o.flatten(0, 1)), output_state.copy_(state.mT)


def flashinfer_step(value_first):
    """One token each; decay and beta from the raw gates, the state in place."""

    def step(q, k, v, state, A_log, a, dt_bias, b, scale=None, output=None, use_qk_l2norm=True):
        assert state.is_contiguous() and q.shape[1] == 1 and use_qk_l2norm
        q, k = (F.normalize(x, dim=-1) for x in (q, k))
        decay = (-A_log.exp() * F.softplus(a + dt_bias)).exp()
        held = state.mT if value_first else state
        o, new = recurrence(q, k, v, decay, b.sigmoid(), scale, held)
        held.copy_(new)
        return output.copy_(o), state

    return step


FLA = SimpleNamespace(
    chunk_gated_delta_rule=chunk_gated_delta_rule, fused_recurrent_gated_delta_rule=fused_recurrent_gated_delta_rule
)
FLASHINFER = SimpleNamespace(
    prefill=SimpleNamespace(chunk_gated_delta_rule=flashinfer_chunk),
    decode=SimpleNamespace(
        gated_delta_rule_decode=flashinfer_step(False), gated_delta_rule_decode_pretranspose=flashinfer_step(True)
    ),
    version="0",
)


def small(gdn, T):
    """A case of two sequences in fp64."""
    args = gdn.block_inputs([T, T], "small", context=4)
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    return gdn.RuleCase.of(tuple(exact), gdn.MODELS["small"].HK)


@pytest.mark.parametrize("name", ["fla_chunk", "fla_recurrent", "flashinfer_prefill"])
def test_prompts(gdn, name) -> None:
    case = small(gdn, 7)
    want = gdn.ours(case.again(), Form.PREFILL)()
    got = getattr(gdn, name)(FLASHINFER if "infer" in name else FLA, case)()
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and gdn.rel(x, y) < 1e-5  # the operator normalises with an epsilon


@pytest.mark.parametrize("value_first", [False, True])
def test_single_tokens(gdn, value_first) -> None:
    """Twice: the second step reads the state that the first one wrote."""
    case = small(gdn, 1)
    ours = gdn.ours(case.again(), Form.DECODE)
    theirs = gdn.flashinfer_decode(FLASHINFER, case.again(), value_first)
    for _ in range(2):
        for x, y in zip(theirs(), ours(), strict=True):
            assert x.shape == y.shape and gdn.rel(x, y) < 1e-5


def test_inputs_are_those_of_a_static_jet_block(gdn) -> None:
    """Its convolution is one of q, k and the values: the channels of its state say so."""
    *_, conv_state, _, _, _, _, H, K, V, _ = args = gdn.block_inputs([3, 2], "small", context=4)
    assert key_heads(conv_state, H, K, V) == (2, True)
    out = torch.ops.jet.jet_block(*args, Form.PREFILL, *NO_BUFFER, None)
    assert out.shape == (5, H * V) and out.isfinite().all()


def test_sizes_are_the_presets(gdn) -> None:
    assert gdn.MODELS["qwen3.5-4b"] == (32, 128, 128, 16, True) and gdn.MODELS["2b"] == (12, 96, 256, 12, False)


def test_who_differs_or_fails_is_not_timed(gdn) -> None:
    case = small(gdn, 7)
    want = gdn.ours(case.again(), Form.PREFILL)()
    wrong = SimpleNamespace(chunk_gated_delta_rule=lambda q, *rest, **kw: chunk_gated_delta_rule(1.1 * q, *rest, **kw))
    absent = SimpleNamespace(prefill=SimpleNamespace(), version="0")
    libraries = gdn.others(wrong, absent, decode=False)
    notes = {name: gdn.refusal(make, case, want) for name, make in libraries.items()}
    assert "output and states differ by 1.0e-01" in notes["fla 0.6.0"] and "AttributeError" in notes["flashinfer 0"]
    assert [gdn.refusal(make, case, want) for make in gdn.others(FLA, FLASHINFER, False).values()] == ["", ""]


def test_a_case_is_a_row_of_the_block_and_one_of_each_rule(gdn, monkeypatch) -> None:
    monkeypatch.setattr(gdn, "decode_work", lambda *a: (1000, 2))
    absent = SimpleNamespace(decode=SimpleNamespace(gated_delta_rule_decode=flashinfer_step(False)), version="0")
    rows = gdn.compare("small", [1, 1, 1], Form.DECODE, gdn.others(FLA, absent, True), (1e9, 1e12))
    assert [(r.kernel, r.variant) for r in rows] == [
        ("jet_block decode", "jet"),
        ("gated_delta_rule decode", "jet"),
        ("gated_delta_rule decode", "fla 0.6.0"),
        ("gated_delta_rule decode", "flashinfer 0 [K, V]"),
    ]
    assert rows[1].note.startswith("flashinfer 0 [V, K]: AttributeError") and all(r.share for r in rows)
