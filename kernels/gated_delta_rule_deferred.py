"""Steps of the gated delta rule on states that are written every few tokens (step_buffer.py): DECODE and VERIFY.

With state0, the c held tokens and their decays w_j = exp(G - G_j), F_i the sum of g up to token i of the call, and x
one of the call's kn and qn:

    base(x_i) = exp(F_i) (exp(G) state0^T x_i + sum_j w_j (kn_j . x_i) delta_j)
    delta_i = beta_i (v_i - base(kn_i)) - sum_{m < i} beta_i exp(F_i - F_m) (kn_i . kn_m) delta_m
    o_i = base(qn_i) + sum_{m <= i} exp(F_i - F_m) (qn_i . kn_m) delta_m

state0 enters by its products P = state0^T [kn | qn] alone, so that all y = [delta | o] of a head's R tokens are

    y = fixed + mix P        fixed [2 R, V], mix [2 R, 2 R]

Two launches. The first, `decode_inputs_kernel` of one token or `verify_inputs_kernel` of several, knows everything but
the state and leaves x, fixed, mix and g in `work`. In the second, `deferred_step_kernel`, a program owns a (head,
sequence), or of few sequences a share of its rows, and streams the state once, by whole rows, for P: a thread sums
columns of its own, and nothing crosses threads. Where the buffer holds `interval` tokens or more the state is written
with them on the way, and without this call's tokens, which may be taken back. Then come y, the tokens for the buffer,
and the gated norm, by the last of a head's programs. Of few sequences the first kernel asks L2 for the states.

`work` [N, H, WORK] fp32, a row of it: x [2 R, K] | fixed [2 R, V] | mix [2 R, 2 R] | g [R] | 0, the rows of tokens that
a sequence does not have being zero; the last is a counter of programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.attention_decode import num_sms
from jet_export.kernels.common import await_inputs, gdc, sequence_bounds, slot_of, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.gated_delta_rule_decode import decode_inputs_triton
from jet_export.kernels.gated_delta_rule_verify import programs_of_a_head, verify_inputs_triton
from jet_export.kernels.gated_rms_norm import empty_out, gated_norm_tile, rounded
from jet_export.kernels.state_layout import EXTRA, work_columns
from jet_export.kernels.step_buffer import load_position, stream_state, sum_parts, weighted_deltas


@triton.jit(do_not_specialize=["T", "S"])
def deferred_step_kernel(
    work, parts, w_o, gate, out_scale, recurrent_state, step_buffer, state_position, out, cu_seqlens, slots,
    context_lens, T, S, stride_gate, eps,
    OFF_Z: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, WORK: tl.constexpr, INTERVAL: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GROUPS: tl.constexpr, BR: tl.constexpr, STEP: tl.constexpr, MIXED: tl.constexpr,
    CODES: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    """Grid (programs of a head, H, N). R: the most tokens of a sequence. BK, BV: K and V rounded up. GROUPS of the
    state's rows, BR at once. STEP: sequences have one token. MIXED: those of more are left out. NORM: out is the gated
    norm of o."""
    i_p, n_p = tl.program_id(0), tl.num_programs(0)
    i_h = tl.program_id(1)
    i_n = tl.program_id(2) + await_inputs(GDC)
    slot = slot_of(slots, i_n, S)
    bos, tokens = i_n, 1
    if not STEP:
        bos, eos = sequence_bounds(cu_seqlens, i_n, T)
        tokens = eos - bos
    if MIXED and tokens != 1:
        return
    dtype: tl.constexpr = gate.dtype.element_ty
    scale = 1.0
    if CODES:
        scale = tl.load(out_scale)
    row = bos.to(tl.int64)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_v = o_v < V
    p_out = out + row * (H * V) + i_h * V + o_v
    if slot < 0:
        for i_t in range(i_p, tokens, n_p):
            tl.store(p_out + i_t * (H * V), tl.zeros([BV], out.dtype.element_ty), mask=m_v)
        return
    context = tl.load(context_lens + i_n)
    i_head = slot * H + i_h
    position, count = load_position(state_position + i_head, context, ROWS)
    begun = position > 0
    p_x = work + (i_n.to(tl.int64) * H + i_h) * WORK
    p_fixed, p_mix, p_g = p_x + 2 * R * K, p_x + 2 * R * (K + V), p_x + 2 * R * (K + V + 2 * R)
    p_parts = parts + (i_n.to(tl.int64) * H + i_h) * (GROUPS * 2 * R * V)
    p_state = recurrent_state + i_head * (K * V)
    p_held = step_buffer + i_head * (ROWS * WIDTH)
    full = count >= INTERVAL
    if full:
        decay, deltas = weighted_deltas(p_held, count, o_v, m_v, K, V, ROWS, WIDTH)
        P = stream_state(
            p_state, p_x, p_parts, p_held, count, decay, deltas, o_v, m_v, begun, i_p, n_p,
            2 * R, K, V, ROWS, WIDTH, GROUPS, BR,
        )  # fmt: skip
    else:
        P = stream_state(
            p_state, p_x, p_parts, p_held, 0, 0.0, (), o_v, m_v, begun, i_p, n_p,
            2 * R, K, V, 0, WIDTH, GROUPS, BR,
        )  # fmt: skip
    first = tl.where(full, 0, count)  # row of the first new token
    tl.debug_barrier()  # every thread has read the held tokens and the position, and left its parts
    arrived = n_p * 1.0
    if n_p > 1:
        arrived = tl.atomic_add(p_g + R, 1.0, sem="acq_rel") + 1.0
    if arrived < n_p:
        return
    if n_p > 1:
        P = sum_parts(p_parts, o_v, m_v, 2 * R, V, GROUPS)
    for i in tl.static_range(2 * R):
        b_y = tl.load(p_fixed + i * V + o_v, mask=m_v, other=0.0)
        for m in tl.static_range(i % R + 1):
            b_y += tl.load(p_mix + i * (2 * R) + m) * P[m]
        if i < R:
            new = (i < tokens) & (first + i < ROWS)
            p_new = p_held + (first + i) * WIDTH
            b_k = tl.load(p_x + i * K + o_k, mask=o_k < K, other=0.0)
            tl.store(p_new + o_k, b_k, mask=new & (o_k < K))
            tl.store(p_new + K + o_v, b_y, mask=new & m_v)
            tl.store(p_new + K + V, tl.load(p_g + i), mask=new)
        else:
            b_y += tl.load(p_mix + i * (2 * R) + i) * P[i]
            b_y = b_y[None, :]
            if NORM:
                p_gate = gate + (row + i - R) * stride_gate + OFF_Z + i_h * V + o_v
                b_gate = tl.load(p_gate, mask=m_v & (i - R < tokens), other=0.0).to(tl.float32)
                b_weight = tl.load(w_o + o_v, mask=m_v, other=0.0).to(tl.float32)
                b_y = gated_norm_tile(b_y, b_weight[None, :], b_gate[None, :], eps, V)
            m_out = (m_v & (i - R < tokens))[None, :]
            tl.store(p_out[None, :] + (i - R) * (H * V), rounded(b_y, scale, dtype, CODES), mask=m_out)
    tl.store(state_position + i_head, tl.maximum(context, 0) - first)


def deferred_delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    head_dims: tuple[int, int, int],
    buffer: tuple[Tensor, Tensor, int],
    verify: bool = False,
    offsets: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0),
    conv: tuple[Tensor, Tensor] | None = None,
    raw_gates: tuple[Tensor, Tensor] | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
    key_heads: int = 0,
    out_scale: Tensor | None = None,
) -> Tensor:
    """o [T, H, V] in q's dtype, or with `norm` its gated norm. Arguments as `decode_delta_rule_triton`; `buffer`:
    step_buffer, state_position, interval.

    `verify`: sequences have as many tokens as the buffer can take back, rows - interval + 1, at most, and MAX_VERIFY:
    more are lost. Otherwise they have one, or with `out` those that have more are left out."""
    T, N, (H, K, V) = q.shape[0], slots.shape[0], head_dims
    step_buffer, state_position, interval = buffer
    held = step_buffer.shape[2]
    R = held - interval + 1 if verify else 1
    w_o, gate, eps = norm or (q, q, 0.0)
    mixed = out is not None
    out = empty_out(q, (T, H, V), out_scale) if out is None else out
    columns = work_columns(R, K, V)
    work = q.new_empty(N, H, columns, dtype=torch.float32)
    inputs: dict[str, Any] = {"offsets": offsets, "conv": conv, "raw_gates": raw_gates, "key_heads": key_heads}
    args = q, k, v, beta, g, recurrent_state, cu_seqlens, slots, context_lens, head_dims, buffer, work
    if verify:
        verify_inputs_triton(*args, **inputs)
    else:
        decode_inputs_triton(*args, **inputs, mixed=mixed)
    use = lookup("delta_rule_deferred", state_dtype=recurrent_state.dtype, head_k_dim=K, head_v_dim=V, tokens=R)
    sms = num_sms(q.device)
    few = torch.sym_min(N, torch.sym_max(1, sms // H))  # sequences whose heads have several programs
    parts = q.new_empty(few, H, use["GROUPS"], 2 * R, V, dtype=torch.float32)
    wrap(deferred_step_kernel)[(programs_of_a_head(N, H, use["GROUPS"], sms), H, N)](
        work, parts, w_o, gate, w_o if out_scale is None else out_scale, recurrent_state, step_buffer, state_position,
        out, cu_seqlens, slots, context_lens, T, recurrent_state.shape[0], gate.stride(0), eps,
        OFF_Z=offsets[4], H=H, K=K, V=V, NORM=norm is not None, ROWS=held, WIDTH=K + V + EXTRA, WORK=columns,
        INTERVAL=interval, R=R, BK=triton.next_power_of_2(K), BV=triton.next_power_of_2(V),
        STEP=not (verify or mixed), MIXED=mixed, CODES=out_scale is not None, GDC=gdc(), **use,
    )  # fmt: skip
    return out
