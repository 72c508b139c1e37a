"""JetBlock between its projections, as one op: activations, dynamic convolution, gated delta rule, gated norm.

    [q | k | u | gate | ...] = qkuz,  [b | a] = ba                                (raw projections of x)
    q = silu(q), k = silu(k);   v = silu(dynamic_conv(u, kappa))                  (dynamic_conv.py)
or  [q | k | v] = silu(static_conv([q | k | u], kappa))                           (Gated DeltaNet)
    beta = sigmoid(b), rounded to the model dtype;  g = -exp(A_log) softplus(a + dt_bias), fp32
    o = gated_delta_rule(q, k, v, beta, g)                                        (gated_delta_rule.py)
    out = gated_rms_norm(o, w_o, gate), with out_scale in codes                   (gated_rms_norm.py)

D = H * V. Everything inside is fp32 apart from the operands of matrix products; one rounding at the end.

conv_state [S, W-1 or more, C] says which channels are convolved: C = D, those of u, or C = 2 HK K + D, those of q, k
and u; there HK heads of q and k are shared by the H heads of values (gated_delta_rule.py). kappa is of each token,
[T, C*W], or of all, [C*W]. A JetBlock has C = D and the former, a Gated DeltaNet of Qwen3.5 has both of the latter.
Source: Jet-Nemotron, arXiv 2508.15884, section 3.3; Gated DeltaNet, arXiv 2412.06464.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.common import acc_dtype, by_rows, rows, zero_padding
from jet_export.kernels.dynamic_conv import dynamic_conv_ref, dynamic_conv_triton
from jet_export.kernels.form import MAX_VERIFY, Form
from jet_export.kernels.gated_delta_rule import packed_gated_delta_rule_ref
from jet_export.kernels.gated_delta_rule_chunk import chunk_delta_rule_triton
from jet_export.kernels.gated_delta_rule_decode import decode_delta_rule_triton
from jet_export.kernels.gated_delta_rule_deferred import deferred_delta_rule_triton
from jet_export.kernels.gated_rms_norm import gated_rms_norm_ref, gated_rms_norm_triton
from jet_export.kernels.gemv import FP8, to_codes
from jet_export.kernels.step_buffer import flush_triton, held_buffer
from jet_export.kernels.triton_op import triton_op

STATES = {"conv_state", "recurrent_state", "step_buffer", "state_position"}  # updated in place


def key_heads(conv_state: Tensor, num_heads: int, head_k_dim: int, head_v_dim: int) -> tuple[int, bool]:
    """HK, and whether q and k are convolved as the values are."""
    beside = conv_state.shape[2] - num_heads * head_v_dim
    return (beside // (2 * head_k_dim), True) if beside else (num_heads, False)


def jet_block_ref(
    qkuz: Tensor,  # [T, >= 2 HK K + 2D]: q | k | u | gate | ignored columns
    ba: Tensor,  # [T, 2H]: b | a
    kappa: Tensor,  # [T, C*W], or [C*W] for all tokens
    A_log: Tensor,  # [H]
    dt_bias: Tensor,  # [H]
    w_o: Tensor,  # [V]
    conv_state: Tensor,  # [S, W-1, C], or a ring of more rows (dynamic_conv.py); updated in place
    recurrent_state: Tensor,  # [S, H, K, V], updated in place
    cu_seqlens: Tensor,  # [N+1]
    slots: Tensor,  # [N]
    context_lens: Tensor,  # [N]
    num_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    norm_eps: float,
    form: int,
    step_buffer: Tensor | None = None,  # [S, H, rows, K + V + 4], updated in place (step_buffer.py)
    state_position: Tensor | None = None,  # [S, H], updated in place
    interval: int = 1,
    out_scale: Tensor | None = None,  # [1]
) -> Tensor:  # [T, D] in qkuz's dtype, or float8_e4m3fn with out_scale
    """The specification: the three references composed, in fp32 (fp64 for fp64 inputs)."""
    T, H, K, V = qkuz.shape[0], num_heads, head_k_dim, head_v_dim
    (HK, conv_qk), D = key_heads(conv_state, H, K, V), H * V
    acc = acc_dtype(qkuz.dtype)
    qkv, gate = qkuz[:, : 2 * HK * K + 2 * D].tensor_split([2 * HK * K + D], -1)
    b, a = ba.to(acc).split(H, -1)
    beta = by_rows(torch.sigmoid, b).to(qkuz.dtype)
    g = -A_log.to(acc).exp() * by_rows(F.softplus, a + dt_bias.to(acc))
    if conv_qk:
        qkv = dynamic_conv_ref(qkv, kappa, conv_state, cu_seqlens, slots, context_lens)
    q, k, v = qkv.split([HK * K, HK * K, D], -1)
    if not conv_qk:
        v = dynamic_conv_ref(v, kappa, conv_state, cu_seqlens, slots, context_lens)
        q, k = (by_rows(F.silu, x.to(acc)) for x in (q, k))
    q, k = (x.reshape(T, HK, K) for x in (q, k))
    o = packed_gated_delta_rule_ref(
        q, k, v.reshape(T, H, V), beta, g, recurrent_state, cu_seqlens, slots, context_lens, form,
        step_buffer, state_position, interval,
    )  # fmt: skip
    out = gated_rms_norm_ref(o, w_o, gate.reshape(T, H, V), norm_eps)
    out = zero_padding(out, cu_seqlens, slots).reshape(T, D)  # a padding row's gate is arbitrary
    return out if out_scale is None else to_codes(out.to(acc), out_scale)


def jet_block_triton(
    qkuz: Tensor,
    ba: Tensor,
    kappa: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    w_o: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    num_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    norm_eps: float,
    form: int,
    step_buffer: Tensor | None = None,
    state_position: Tensor | None = None,
    interval: int = 1,
    out_scale: Tensor | None = None,
) -> Tensor:
    """Launches the kernels: one for DECODE, two beside a step buffer and for VERIFY, those of the three ops for
    PREFILL, all for MIXED. Where q and k are convolved, the convolution goes before, as heads share its channels: in
    one launch for DECODE and VERIFY, else in two.

    Arguments as `jet_block_ref`."""
    H, K, V = num_heads, head_k_dim, head_v_dim
    HK, conv_qk = key_heads(conv_state, H, K, V)
    qkuz, ba, kappa = rows(qkuz), rows(ba), rows(kappa)
    off_u = 2 * HK * K
    off_z = off_u + H * V
    sequences = cu_seqlens, slots, context_lens
    tail = recurrent_state, *sequences, (H, K, V)
    form = Form(int(form))  # may be symbolic in a dynamic torch.compile
    buffer = held_buffer(step_buffer, state_position, interval, form)
    most = {Form.DECODE: 1, Form.VERIFY: MAX_VERIFY}.get(form, 0)  # tokens of a sequence
    x = dynamic_conv_triton(qkuz, kappa, conv_state, *sequences, most=most) if conv_qk else qkuz  # q | k | v or u
    whole: dict[str, Any] = {
        "offsets": (0, HK * K, off_u, H, off_z),
        "conv": None if conv_qk else (kappa, conv_state),
        "raw_gates": (A_log, dt_bias),
        "norm": (w_o, qkuz, norm_eps),
        "key_heads": HK,
        "out_scale": out_scale,
    }
    out: Tensor | None = None
    if form in (Form.PREFILL, Form.MIXED):
        mixed = form is Form.MIXED
        if buffer is not None:
            flush_triton(recurrent_state, *buffer[:2], *sequences, qkuz.shape[0], mixed)
        v, off_v = x, off_u
        if not conv_qk:
            v, off_v = dynamic_conv_triton(qkuz, kappa, conv_state, *sequences, off_u, mixed), 0
        o = chunk_delta_rule_triton(
            x, x, v, ba, ba, *tail, offsets=(0, HK * K, off_v, H), raw_gates=(A_log, dt_bias), mixed=mixed,
            key_heads=HK, silu=not conv_qk,
        )  # fmt: skip
        out = gated_rms_norm_triton(o, w_o, qkuz, norm_eps, off_z, out_scale)
    if form is not Form.PREFILL:  # after the norm, which knows no sequences and writes the rows of single tokens too
        inputs = x, x, x, ba, ba, *tail
        if buffer is None:
            out = decode_delta_rule_triton(*inputs, out=out, **whole)
        else:
            out = deferred_delta_rule_triton(*inputs, buffer, form is Form.VERIFY, out=out, **whole)
    assert out is not None
    return out.view(qkuz.shape[0], H * V)


@torch.library.custom_op("jet::jet_block_cpu", mutates_args=STATES)
def jet_block_cpu(
    qkuz: Tensor,
    ba: Tensor,
    kappa: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    w_o: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    num_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    norm_eps: float,
    form: int,
    step_buffer: Tensor | None,
    state_position: Tensor | None,
    interval: int,
    out_scale: Tensor | None,
) -> Tensor:
    return jet_block_ref(
        qkuz, ba, kappa, A_log, dt_bias, w_o, conv_state, recurrent_state, cu_seqlens, slots, context_lens,
        num_heads, head_k_dim, head_v_dim, norm_eps, form, step_buffer, state_position, interval, out_scale,
    )  # fmt: skip


@jet_block_cpu.register_fake
def _(
    qkuz,
    ba,
    kappa,
    A_log,
    dt_bias,
    w_o,
    conv_state,
    recurrent_state,
    cu_seqlens,
    slots,
    context_lens,
    num_heads,
    head_k_dim,
    head_v_dim,
    norm_eps,
    form,
    step_buffer,
    state_position,
    interval,
    out_scale,
):
    return qkuz.new_empty(qkuz.shape[0], num_heads * head_v_dim, dtype=qkuz.dtype if out_scale is None else FP8)


@triton_op("jet::jet_block", mutates_args=STATES)
def jet_block(
    qkuz: Tensor,
    ba: Tensor,
    kappa: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    w_o: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    num_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    norm_eps: float,
    form: int,
    step_buffer: Tensor | None,
    state_position: Tensor | None,
    interval: int,
    out_scale: Tensor | None,
) -> Tensor:
    """[T, D]; both states are updated in place. Arguments as `jet_block_ref`."""
    if qkuz.device.type == "cpu":
        return torch.ops.jet.jet_block_cpu(
            qkuz, ba, kappa, A_log, dt_bias, w_o, conv_state, recurrent_state, cu_seqlens, slots, context_lens,
            num_heads, head_k_dim, head_v_dim, norm_eps, form, step_buffer, state_position, interval, out_scale,
        )  # fmt: skip
    return jet_block_triton(
        qkuz, ba, kappa, A_log, dt_bias, w_o, conv_state, recurrent_state, cu_seqlens, slots, context_lens,
        num_heads, head_k_dim, head_v_dim, norm_eps, form, step_buffer, state_position, interval, out_scale,
    )  # fmt: skip
