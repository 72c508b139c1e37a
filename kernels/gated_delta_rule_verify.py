"""1 to BT tokens of each sequence, the last of which may be taken back: the form VERIFY, two launches.

With state0, the c held tokens and their decays w_j = exp(G - G_j) as in gated_delta_rule_decode.py, F_i the sum of g up
to token i of the call, and x one of the call's kn and qn:

    base(x_i) = exp(F_i) (exp(G) state0^T x_i + sum_j w_j (kn_j . x_i) delta_j)
    delta_i = beta_i (v_i - base(kn_i)) - sum_{m < i} beta_i exp(F_i - F_m) (kn_i . kn_m) delta_m
    o_i = base(qn_i) + sum_{m <= i} exp(F_i - F_m) (qn_i . kn_m) delta_m

With the rows [kn | qn] as one matrix X of 2 BT rows this is one unit lower triangular system, (I + L) [delta | o] = r:
X X^T, X held^T and X state0 are all the products there are. They are in fp32 (three TF32 products on tensor cores),
since the results stand for single steps.

`delta_rule_verify_kernel`: a program owns a head's columns of V, of a sequence. What it needs of X it computes itself,
so that a few sequences fill the GPU: of many, a program takes several tiles of BV columns, with the same bits. It reads
the state once and writes it only where the step buffer is full, before this call's tokens (step_buffer.py), and it
appends delta. `verify_append_kernel` writes what the programs of a head share, and all of them have read by then: kn,
g and state_position; and it applies the gated norm, which is over the head. With W > 0 they are a whole JetBlock, as in
gated_delta_rule_decode.py; conv_state is a ring there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.attention_decode import num_sms
from jet_export.kernels.common import INTERPRET, ask_for, await_inputs, gdc, sequence_bounds, silu, slot_of, wrap
from jet_export.kernels.configs import current_sm, lookup
from jet_export.kernels.dynamic_conv import conv_tile, store_ring
from jet_export.kernels.form import MAX_VERIFY
from jet_export.kernels.gated_delta_rule_chunk import gates, l2_normalise, unit_lower_inverse
from jet_export.kernels.gated_rms_norm import gated_norm_tile
from jet_export.kernels.state_layout import EXTRA
from jet_export.kernels.step_buffer import add_held, held_decays, load_position


@triton.jit
def load_state(p_state, o_k, i_v, held, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Columns i_v + [0, BV) of the state [NK, BK, BV], in the pool's dtype."""
    o_v = i_v + tl.arange(0, BV)[None, None, :]
    m = (o_k < K)[:, :, None] & held & (o_v < V)
    return tl.load(p_state + o_k[:, :, None] * V + o_v, mask=m, other=0.0)


@triton.jit(do_not_specialize=["T", "S"])
def delta_rule_verify_kernel(
    q, k, v, beta, g, kappa, A_log, dt_bias, conv_state, recurrent_state, step_buffer, state_position, o,
    cu_seqlens, slots, context_lens, T, S, stride_q, stride_k, stride_v, stride_b, stride_g, stride_kappa,
    OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_V: tl.constexpr, OFF_G: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, CONV_ROWS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, INTERVAL: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, NK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, GDC: tl.constexpr,
    ASK: tl.constexpr,
):  # fmt: skip
    """Grid (programs of a head, H, N). o: [T, H, V] fp32. BT: the most tokens, 8 or more; BC: ROWS rounded up, 16 or
    more. K is cut into NK blocks of BK, whose products different warps sum: so they fit the registers. ASK: L2 is
    asked for the state first."""
    i_h = tl.program_id(1)
    i_n = tl.program_id(2)
    if ASK:  # for its share of the state, which only earlier steps have written
        at = (tl.maximum(slot_of(slots, i_n, S), 0) * H + i_h) * (K * V) + tl.program_id(0) * (K * BV)
        i_n += ask_for(recurrent_state + at, K * BV * (recurrent_state.dtype.element_ty.primitive_bitwidth // 8))
    i_n += await_inputs(GDC)
    slot = slot_of(slots, i_n, S)
    if slot < 0:
        return
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    context = tl.load(context_lens + i_n)
    i_head = slot * H + i_h
    o_k = tl.arange(0, NK)[:, None] * BK + tl.arange(0, BK)[None, :]
    o_row = tl.arange(0, NK * BK)
    p_state = recurrent_state + i_head * (K * V)
    position, count = load_position(state_position + i_head, context, ROWS)
    row = bos.to(tl.int64)
    o_r = tl.arange(0, 2 * BT)  # rows of X: the kn of BT tokens, then their qn
    o_t = o_r % BT
    is_k = o_r < BT
    m_t = o_t < tl.minimum(eos - bos, BT)
    m_new = is_k & m_t
    m_k = (o_k < K)[:, None, :]
    p_q = q + row * stride_q + OFF_Q + i_h * K + o_t[None, :, None] * stride_q + o_k[:, None, :]
    p_k = k + row * stride_k + OFF_K + i_h * K + o_t[None, :, None] * stride_k + o_k[:, None, :]
    b_q = tl.load(p_q, mask=m_k & (m_t & ~is_k)[None, :, None], other=0.0)
    b_k = tl.load(p_k, mask=m_k & m_new[None, :, None], other=0.0)
    b_beta, b_g = gates(
        beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, stride_b, stride_g, A_log, dt_bias, i_h,
        o_t, m_t, q.dtype.element_ty, W > 0,
    )  # fmt: skip
    p_held = step_buffer + i_head * (ROWS * WIDTH)
    o_c = tl.arange(0, BC)
    m_c = o_c < count
    b_held = tl.load(p_held + o_c[None, :, None] * WIDTH + o_k[:, None, :], mask=m_c[None, :, None] & m_k, other=0.0)
    b_total, b_w = held_decays(p_held + K + V, o_c, m_c, WIDTH)

    b_x = b_q.to(tl.float32) + b_k.to(tl.float32)  # [NK, 2 BT, BK]
    if W > 0:
        b_x = silu(b_x)
    b_x *= (tl.rsqrt(tl.sum(tl.sum(b_x * b_x, 2), 0) + 1e-6) * tl.where(is_k, 1.0, K**-0.5))[None, :, None]
    o_i, o_m = o_t[:, None], o_t[None, :]
    b_F = tl.sum(tl.where((o_i >= o_m) & is_k[None, :], b_g[None, :], 0.0), 1)
    b_L = tl.sum(tl.dot(b_x, tl.permute(b_x, (0, 2, 1)), input_precision=PRECISION), 0)
    b_L *= tl.where(is_k, b_beta, -1.0)[:, None] * tl.exp(tl.where(o_i >= o_m, b_F[:, None] - b_F[None, :], 0.0))
    m_L = is_k[None, :] & ((o_i > o_m) | (~is_k[:, None] & (o_i == o_m)))
    b_solve = unit_lower_inverse(tl.where(m_L, b_L, 0.0), 2 * BT, PRECISION)
    b_held_x = tl.dot(b_x, tl.permute(b_held, (0, 2, 1)), input_precision=PRECISION)
    b_held_x = tl.sum(b_held_x, 0) * b_w[None, :]  # [2 BT, BC]
    b_decay, b_eF = tl.exp(b_total), tl.exp(b_F)[:, None]

    write = count >= INTERVAL
    first = tl.where(write, 0, count)  # row of the first new token
    m_held = m_new & (first + o_t < ROWS)
    p_delta = p_held + (first + o_t)[:, None] * WIDTH + K
    p_o = o + row * (H * V) + i_h * V + o_t[:, None] * (H * V)
    for i_v in range(tl.program_id(0) * BV, V, tl.num_programs(0) * BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < V
        b_state = load_state(p_state, o_k, i_v, position > 0, K, V, BV).to(tl.float32)
        p_v = v + row * stride_v + OFF_V + i_h * V
        p_conv = conv_state + slot * (CONV_ROWS * H * V) + i_h * V
        if W > 0:
            p_kappa = kappa + row * stride_kappa + i_h * V * W
            b_v = conv_tile(
                p_v, stride_v, p_kappa, stride_kappa, p_conv, o_t, m_new, i_v, V, 0, context, H * V, W, CONV_ROWS, BV,
                False,
            )  # fmt: skip
        p_v += o_t[:, None] * stride_v + o_v[None, :]
        b_u = tl.load(p_v, mask=m_new[:, None] & m_v[None, :], other=0.0)
        if W == 0:
            b_v = b_u.to(tl.float32)
        p_deltas = p_held + o_c[:, None] * WIDTH + K + o_v[None, :]
        b_deltas = tl.load(p_deltas, mask=m_c[:, None] & m_v[None, :], other=0.0)
        b_base = tl.sum(tl.dot(b_x, b_state, input_precision=PRECISION), 0) * b_decay  # [2 BT, BV]
        b_base = tl.dot(b_held_x, b_deltas, acc=b_base, input_precision=PRECISION) * b_eF
        b_r = tl.where(m_new[:, None], b_beta[:, None] * (b_v - b_base), b_base)
        b_y = tl.dot(b_solve, b_r, input_precision=PRECISION)  # delta and o
        if write:  # the tile is read again, from L2: kept, it would not fit the registers
            p_tile = p_state + o_row[:, None] * V + o_v[None, :]
            m_tile = (o_row < K)[:, None] & m_v[None, :]
            b_keep = tl.load(p_tile, mask=m_tile & (position > 0), other=0.0).to(tl.float32) * b_decay
            b_keep = add_held(b_keep, p_held, b_w, o_c, count, o_row[:, None], i_v, K, V, WIDTH, BV)
            tl.debug_barrier()  # every thread has read the state
            tl.store(p_tile, b_keep.to(recurrent_state.dtype.element_ty), mask=m_tile)
        tl.debug_barrier()  # every thread has read the held deltas and the ring's rows
        tl.store(p_delta + o_v[None, :], b_y, mask=m_held[:, None] & m_v[None, :])
        tl.store(p_o + o_v[None, :], b_y, mask=(m_t & ~is_k)[:, None] & m_v[None, :])
        if W > 0:
            store_ring(p_conv, b_u, o_t, m_new, o_v, m_v, context, H * V, CONV_ROWS)


@triton.jit(do_not_specialize=["T", "S"])
def verify_append_kernel(
    k, g, A_log, dt_bias, w_o, gate, step_buffer, state_position, o, out,
    cu_seqlens, slots, context_lens, T, S, stride_k, stride_g, stride_gate, eps,
    OFF_K: tl.constexpr, OFF_G: tl.constexpr, OFF_Z: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    JET: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, INTERVAL: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    """Grid (H, N). JET: the inputs are a JetBlock's, and out is the gated norm of o. BV: V rounded up."""
    i_h = tl.program_id(0)
    i_n = tl.program_id(1) + await_inputs(GDC)
    slot = slot_of(slots, i_n, S)
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    context = tl.load(context_lens + i_n)
    dtype: tl.constexpr = out.dtype.element_ty
    row = bos.to(tl.int64)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    m_v = o_v < V
    p_out = out + row * (H * V) + i_h * V
    if slot < 0:
        for i_t in range(0, eos - bos):
            tl.store(p_out + i_t * (H * V) + o_v, tl.zeros([BV], dtype), mask=m_v)
        return
    m_t = o_t < tl.minimum(eos - bos, BT)
    m_out = m_t[:, None] & m_v[None, :]
    o_out = o_t[:, None] * (H * V) + o_v[None, :]
    b_o = tl.load(o + row * (H * V) + i_h * V + o_out, mask=m_out, other=0.0)
    p_k = k + row * stride_k + OFF_K + i_h * K + o_t[:, None] * stride_k + o_k[None, :]
    b_k = tl.load(p_k, mask=m_t[:, None] & (o_k < K)[None, :], other=0.0)
    p_g = g + row * stride_g + OFF_G + i_h
    _, b_g = gates(p_g, p_g, stride_g, stride_g, A_log, dt_bias, i_h, o_t, m_t, dtype, JET)
    i_head = slot * H + i_h
    _, count = load_position(state_position + i_head, context, ROWS)
    if JET:
        p_gate = gate + row * stride_gate + OFF_Z + i_h * V + o_t[:, None] * stride_gate + o_v[None, :]
        b_gate = tl.load(p_gate, mask=m_out, other=0.0).to(tl.float32)
        b_weight = tl.load(w_o + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_o = gated_norm_tile(b_o, b_weight[None, :], b_gate, eps, V)
    tl.store(p_out + o_out, b_o.to(dtype), mask=m_out)
    first = tl.where(count >= INTERVAL, 0, count)
    m_new = m_t & (first + o_t < ROWS)
    p_new = step_buffer + i_head * (ROWS * WIDTH) + (first + o_t) * WIDTH
    tl.store(p_new[:, None] + o_k[None, :], l2_normalise(b_k, JET), mask=m_new[:, None] & (o_k < K)[None, :])
    tl.store(p_new + K + V, b_g, mask=m_new)
    tl.debug_barrier()  # every thread has read the old position
    tl.store(state_position + i_head, tl.maximum(context, 0) - first)


def programs_of_a_head(N, num_heads: int, tiles: int, sms: int):
    """Programs that share a head's tiles of V; N may be symbolic. Two a multiprocessor, if there are tiles enough."""
    return torch.sym_max(1, torch.sym_min(tiles, 2 * sms // (N * num_heads)))


def asks(state: Tensor, BV: int) -> bool:
    """Whether `ask_for` can be used: SM 9.0 on, and whole tiles of whole units of 16 bytes."""
    K, V = state.shape[2:]
    return not INTERPRET and (current_sm() or 0) >= 90 and V % BV == 0 and K * BV * state.element_size() % 16 == 0


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
    """o [T, H, V] in q's dtype, or with `norm` its gated norm. Arguments as `decode_delta_rule_triton`; conv, raw_gates
    and norm come together.

    A sequence has at most as many tokens as the buffer can take back, rows - interval + 1, and MAX_VERIFY: more are
    lost."""
    T, N, (H, K, V) = q.shape[0], slots.shape[0], head_dims
    step_buffer, state_position, interval = buffer
    kappa, conv_state = conv or (q, q)
    A_log, dt_bias = raw_gates or (g, g)
    w_o, gate, eps = norm or (q, q, 0.0)
    W, conv_rows = (kappa.shape[1] // (H * V), conv_state.shape[1]) if conv else (0, 0)
    held = step_buffer.shape[2]
    use = lookup("delta_rule_verify", state_dtype=recurrent_state.dtype, head_k_dim=K, head_v_dim=V)
    programs = programs_of_a_head(N, H, triton.cdiv(V, use["BV"]), num_sms(q.device))
    BK = triton.next_power_of_2(K)
    sizes = {
        "H": H, "K": K, "V": V, "ROWS": held, "WIDTH": K + V + EXTRA, "INTERVAL": interval,
        "BT": 8 if held - interval + 1 <= 8 else MAX_VERIFY, "GDC": gdc(),
    }  # fmt: skip
    off_q, off_k, off_v, off_g, off_z = offsets
    tail = cu_seqlens, slots, context_lens, T, recurrent_state.shape[0]
    o = q.new_empty(T, H, V, dtype=torch.float32)
    out = q.new_empty(T, H, V)
    wrap(delta_rule_verify_kernel)[(programs, H, N)](
        q, k, v, beta, g, kappa, A_log, dt_bias, conv_state, recurrent_state, step_buffer, state_position, o, *tail,
        q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0), kappa.stride(0),
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, W=W, CONV_ROWS=conv_rows, PRECISION="tf32x3",
        BC=max(16, triton.next_power_of_2(held)), NK=max(1, BK // 32), BK=min(32, max(16, BK)),
        ASK=asks(recurrent_state, use["BV"]), **sizes, **use,
    )  # fmt: skip
    wrap(verify_append_kernel)[(H, N)](
        k, g, A_log, dt_bias, w_o, gate, step_buffer, state_position, o, out, *tail,
        k.stride(0), g.stride(0), gate.stride(0), eps, OFF_K=off_k, OFF_G=off_g, OFF_Z=off_z, JET=norm is not None,
        BK=BK, BV=triton.next_power_of_2(V), **sizes,
    )  # fmt: skip
    return out
