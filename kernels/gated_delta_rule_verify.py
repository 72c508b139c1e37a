"""1 to BT tokens of each sequence, the last of which may be taken back: the form VERIFY, one launch.

A program owns one (head, sequence). It reads the state once and writes it only where the step buffer is full, before
this call's tokens (step_buffer.py); their (kn, delta, g) are appended. With state0, the c held tokens and their decays
w_j = exp(G - G_j) as in gated_delta_rule_decode.py, and F_i the sum of g up to token i of the call:

    base(x_i) = exp(F_i) (exp(G) state0^T x_i + sum_j w_j (kn_j . x_i) delta_j)                    x is kn or qn
    A_im = beta_i exp(F_i - F_m) (kn_i . kn_m)   (m < i);      delta = (I + A)^-1 beta (v - base(kn))
    o_i = base(qn_i) + sum_{m <= i} exp(F_i - F_m) (qn_i . kn_m) delta_m

All products are matrix products of BT rows, in fp32 (three TF32 products on tensor cores), since the results stand for
single steps. With W > 0 it is a whole JetBlock, as in gated_delta_rule_decode.py; conv_state is a ring there.
"""

import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import await_inputs, gdc, sequence_bounds, slot_of, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.dynamic_conv import conv_tile, store_ring
from jet_export.kernels.form import MAX_VERIFY
from jet_export.kernels.gated_delta_rule_chunk import gates, l2_normalise, unit_lower_inverse
from jet_export.kernels.gated_rms_norm import gated_norm_tile
from jet_export.kernels.state_layout import EXTRA
from jet_export.kernels.step_buffer import add_held, held_decays, load_position


@triton.jit(do_not_specialize=["T", "S"])
def verify_kernel(
    q, k, v, beta, g, kappa, A_log, dt_bias, w_o, gate, conv_state, recurrent_state, step_buffer, state_position, out,
    cu_seqlens, slots, context_lens, T, S,
    stride_q, stride_k, stride_v, stride_b, stride_g, stride_kappa, stride_gate, eps,
    OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_V: tl.constexpr, OFF_G: tl.constexpr, OFF_Z: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, CONV_ROWS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, INTERVAL: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, BC: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    """Grid (H, N). Arguments as decode_kernel's; BT: the most tokens, BC: ROWS rounded up, both at least 16."""
    i_h = tl.program_id(0)
    i_n = tl.program_id(1) + await_inputs(GDC)
    slot = slot_of(slots, i_n, S)
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    n_t = tl.minimum(eos - bos, BT)
    context = tl.load(context_lens + i_n)
    dtype: tl.constexpr = out.dtype.element_ty
    row = bos.to(tl.int64)
    o_t = tl.arange(0, BT)
    o_v = tl.arange(0, NV * BV)
    p_out = out + row * (H * V) + i_h * V
    if slot < 0:
        for i_t in range(0, eos - bos):
            tl.store(p_out + i_t * (H * V) + o_v, tl.zeros([NV * BV], dtype), mask=o_v < V)
        return
    m_t = o_t < n_t
    o_k = tl.arange(0, BK)
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    i_head = slot * H + i_h
    p_held = step_buffer + i_head * (ROWS * WIDTH)
    position, count = load_position(state_position + i_head, context, ROWS)
    write = count >= INTERVAL
    p_q = q + row * stride_q + OFF_Q + i_h * K + o_t[:, None] * stride_q + o_k[None, :]
    p_k = k + row * stride_k + OFF_K + i_h * K + o_t[:, None] * stride_k + o_k[None, :]
    b_q = l2_normalise(tl.load(p_q, mask=m_tk, other=0.0), W > 0) * (K**-0.5)  # [BT, BK]
    b_k = l2_normalise(tl.load(p_k, mask=m_tk, other=0.0), W > 0)
    b_beta, b_g = gates(
        beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, stride_b, stride_g, A_log, dt_bias, i_h,
        o_t, m_t, dtype, W > 0,
    )  # fmt: skip
    b_F = tl.cumsum(b_g, 0)
    b_eF = tl.exp(b_F)[:, None]
    o_c = tl.arange(0, BC)
    m_c = o_c < count
    b_total, b_w = held_decays(p_held + K + V, o_c, m_c, WIDTH)
    b_decay = tl.exp(b_total)
    b_held = tl.load(p_held + o_c[:, None] * WIDTH + o_k[None, :], mask=m_c[:, None] & (o_k < K)[None, :], other=0.0)
    b_held_k = tl.dot(b_k, tl.trans(b_held), input_precision=PRECISION) * b_w[None, :]  # [BT, BC]
    b_held_q = tl.dot(b_q, tl.trans(b_held), input_precision=PRECISION) * b_w[None, :]
    o_i, o_m = o_t[:, None], o_t[None, :]
    b_from = tl.where(o_i >= o_m, tl.exp(b_F[:, None] - b_F[None, :]), 0.0)  # exp(F_i - F_m)
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_from
    b_A = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_from * b_beta[:, None]
    b_solve = unit_lower_inverse(tl.where(o_i > o_m, b_A, 0.0), BT, PRECISION) * b_beta[None, :]

    first = tl.where(write, 0, count)  # row of the first new token
    m_new = m_t & (first + o_t < ROWS)
    p_new = p_held + (first + o_t)[:, None] * WIDTH
    p_state = recurrent_state + i_head * (K * V) + o_k[:, None] * V
    o_tile = tl.arange(0, NV)[None, :, None]
    b_o = tl.zeros([BT, NV, BV], tl.float32)
    for i_tile in range(0, tl.cdiv(V, BV)):
        i_v = i_tile * BV
        o_sv = i_v + tl.arange(0, BV)
        m_sv = o_sv < V
        m_state = (o_k < K)[:, None] & m_sv[None, :]
        b_state = tl.load(p_state + o_sv[None, :], mask=m_state & (position > 0), other=0.0).to(tl.float32) * b_decay
        if W > 0:
            b_v = conv_tile(
                v + row * stride_v + OFF_V + i_h * V, stride_v, kappa + row * stride_kappa + i_h * V * W, stride_kappa,
                conv_state + slot * (CONV_ROWS * H * V) + i_h * V, o_t, m_t, i_v, V, 0, context,
                H * V, W, CONV_ROWS, BV, False,
            )  # fmt: skip
        else:
            p_v = v + row * stride_v + OFF_V + i_h * V + o_t[:, None] * stride_v + o_sv[None, :]
            b_v = tl.load(p_v, mask=m_t[:, None] & m_sv[None, :], other=0.0).to(tl.float32)
        m_cv = m_c[:, None] & m_sv[None, :]
        b_deltas = tl.load(p_held + o_c[:, None] * WIDTH + K + o_sv[None, :], mask=m_cv, other=0.0)
        b_base_k = tl.dot(b_k, b_state, input_precision=PRECISION)
        b_base_k = tl.dot(b_held_k, b_deltas, acc=b_base_k, input_precision=PRECISION) * b_eF
        b_base_q = tl.dot(b_q, b_state, input_precision=PRECISION)
        b_base_q = tl.dot(b_held_q, b_deltas, acc=b_base_q, input_precision=PRECISION) * b_eF
        b_delta = tl.dot(b_solve, tl.where(m_t[:, None], b_v - b_base_k, 0.0), input_precision=PRECISION)
        b_ot = tl.dot(b_qk, b_delta, acc=b_base_q, input_precision=PRECISION)
        b_o = tl.where(o_tile == i_tile, b_ot[:, None, :], b_o)
        if write:
            b_state = add_held(b_state, p_held, b_w, o_c, count, o_k[:, None], i_v, K, V, WIDTH, BV)
            tl.store(p_state + o_sv[None, :], b_state.to(recurrent_state.dtype.element_ty), mask=m_state)
        tl.debug_barrier()  # every thread has read the held tokens and the ring's rows
        tl.store(p_new + K + o_sv[None, :], b_delta, mask=m_new[:, None] & m_sv[None, :])
        if W > 0:
            p_u = v + row * stride_v + OFF_V + i_h * V + o_t[:, None] * stride_v + o_sv[None, :]
            b_u = tl.load(p_u, mask=m_t[:, None] & m_sv[None, :], other=0.0)
            p_conv = conv_state + slot * (CONV_ROWS * H * V) + i_h * V
            store_ring(p_conv, b_u, o_t, m_t, o_sv, m_sv, context, H * V, CONV_ROWS)
    tl.debug_barrier()
    tl.store(p_new + o_k[None, :], b_k, mask=m_new[:, None] & (o_k < K)[None, :])
    tl.store(p_held + (first + o_t) * WIDTH + K + V, b_g, mask=m_new)
    tl.store(state_position + i_head, tl.maximum(context, 0) - first)
    b_o = tl.reshape(b_o, [BT, NV * BV])
    m_out = m_t[:, None] & (o_v < V)[None, :]
    o_out = o_t[:, None]
    if W > 0:
        p_gate = gate + row * stride_gate + OFF_Z + i_h * V + o_out * stride_gate + o_v[None, :]
        b_gate = tl.load(p_gate, mask=m_out, other=0.0).to(tl.float32)
        b_weight = tl.load(w_o + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        b_o = gated_norm_tile(b_o, b_weight[None, :], b_gate, eps, V)
    tl.store(p_out + o_out * (H * V) + o_v[None, :], b_o.to(dtype), mask=m_out)


def verify_delta_rule_triton(
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
    offsets: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0),
    conv: tuple[Tensor, Tensor] | None = None,
    raw_gates: tuple[Tensor, Tensor] | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """o [T, H, V] in q's dtype, or with `norm` its gated norm. Arguments as `decode_delta_rule_triton`.

    Tokens of a sequence beyond MAX_VERIFY, and beyond the buffer's rows, are lost."""
    H, K, V = head_dims
    step_buffer, state_position, interval = buffer
    kappa, conv_state = conv or (q, q)
    A_log, dt_bias = raw_gates or (g, g)
    w_o, gate, eps = norm or (q, q, 0.0)
    W, conv_rows = (kappa.shape[1] // (H * V), conv_state.shape[1]) if conv else (0, 0)
    held = step_buffer.shape[2]
    use = lookup("delta_rule_verify", state_dtype=recurrent_state.dtype, head_k_dim=K, head_v_dim=V)
    out = q.new_empty(q.shape[0], H, V)
    off_q, off_k, off_v, off_g, off_z = offsets
    wrap(verify_kernel)[(H, slots.shape[0])](
        q, k, v, beta, g, kappa, A_log, dt_bias, w_o, gate, conv_state, recurrent_state, step_buffer, state_position,
        out, cu_seqlens, slots, context_lens, q.shape[0], recurrent_state.shape[0],
        q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0), kappa.stride(0), gate.stride(0), eps,
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, OFF_Z=off_z, H=H, K=K, V=V, W=W, CONV_ROWS=conv_rows,
        ROWS=held, WIDTH=K + V + EXTRA, INTERVAL=interval, PRECISION="tf32x3",
        BT=MAX_VERIFY, BK=max(16, triton.next_power_of_2(K)), BV=use["BV"],
        NV=triton.next_power_of_2(triton.cdiv(V, use["BV"])), BC=max(16, triton.next_power_of_2(held)), GDC=gdc(),
        num_warps=use["num_warps"],
    )  # fmt: skip
    return out
