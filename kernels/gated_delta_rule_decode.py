"""One decode step of the gated delta rule for N sequences: equations in gated_delta_rule.py, one launch.

A program owns one (head, sequence). It streams the state [K, V] through registers in tiles of BV columns, reads and
writes every element once, and prefetches the next tile. Both products with the state are taken before the update:
o = exp(g) state^T qn + (qn . kn) delta. With W > 0 it is a whole JetBlock step: the inputs are the raw projections, and
the kernel also applies SiLU, the dynamic convolution (shifting conv_state), the gates and the gated norm over the head.
With MIXED the sequences may be longer: those of one token are stepped, the others are left to the chunk kernels.

With a step buffer (step_buffer.py) the state is state0 and c held tokens. Its products with kn and qn come from those
of state0, taken in the one read, and of the tokens' own; w_j = exp(G - G_j), and x is kn or qn:

    state^T x = exp(g) (exp(G) state0^T x + sum_j w_j (kn_j . x) delta_j)

so a step that only appends its token reads the state, by whole rows, and writes none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import await_inputs, gdc, sequence_bounds, slot_of, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.dynamic_conv import conv_tile, shift_conv_state, store_ring
from jet_export.kernels.gated_delta_rule_chunk import gates, l2_normalise
from jet_export.kernels.gated_rms_norm import gated_norm_tile
from jet_export.kernels.state_layout import EXTRA
from jet_export.kernels.step_buffer import decays, load_position


@triton.jit
def load_state(p_state, o_k, i_v, m_k, held, V: tl.constexpr, BV: tl.constexpr):
    """Columns i_v + [0, BV) of the state, in the pool's dtype."""
    o_v = i_v + tl.arange(0, BV)
    return tl.load(p_state + o_k * V + o_v[None, :], mask=m_k & held & (o_v < V)[None, :], other=0.0)


@triton.jit
def state_products(
    p_state, p_k, p_q, o_v, m_v, begun, K: tl.constexpr, V: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """state^T kn and state^T qn [V rounded up], of a state that is only read. A thread sums columns of its own, and
    nothing crosses threads before the end. p_k and p_q: kn and qn [K] in memory."""
    o_r = tl.arange(0, BR)
    b_k = tl.zeros([BR, o_v.shape[0]], tl.float32)
    b_q = tl.zeros([BR, o_v.shape[0]], tl.float32)
    for i_k in tl.static_range(0, K, BR):
        m_r = i_k + o_r < K
        p_rows = p_state + (i_k + o_r)[:, None] * V + o_v[None, :]
        b_rows = tl.load(p_rows, mask=m_r[:, None] & m_v[None, :] & begun, other=0.0).to(tl.float32)
        b_k += b_rows * tl.load(p_k + i_k + o_r, mask=m_r, other=0.0)[:, None]
        b_q += b_rows * tl.load(p_q + i_k + o_r, mask=m_r, other=0.0)[:, None]
    return tl.sum(b_k, 0), tl.sum(b_q, 0)


@triton.jit(do_not_specialize=["T", "S"])
def decode_kernel(
    q, k, v, beta, g, kappa, A_log, dt_bias, w_o, gate, conv_state, recurrent_state, step_buffer, state_position, query,
    out, cu_seqlens, slots, context_lens, T, S,
    stride_q, stride_k, stride_v, stride_b, stride_g, stride_kappa, stride_gate, eps,
    OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_V: tl.constexpr, OFF_G: tl.constexpr, OFF_Z: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, CONV_ROWS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, INTERVAL: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, MIXED: tl.constexpr,
    GDC: tl.constexpr,
):  # fmt: skip
    """Grid (H, N). OFF_*: the first column of q, k, v (u), g (a), gate in the rows of their tensors.

    NV: the number of V tiles, rounded up to a power of two. ROWS: those of step_buffer, of WIDTH columns; 0: none.
    BC: ROWS rounded up likewise. query [T, H, K] fp32: room for qn. BR: rows at once of a state that is only read."""
    i_h = tl.program_id(0)
    i_n = tl.program_id(1) + await_inputs(GDC)
    slot = slot_of(slots, i_n, S)
    context = tl.load(context_lens + i_n)
    held = context > 0
    row = i_n.to(tl.int64)
    if MIXED:
        bos, eos = sequence_bounds(cu_seqlens, i_n, T)
        if eos - bos != 1:
            return
        row = bos.to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    o_one = tl.arange(0, 1)
    m_one = o_one < 1
    o_v = tl.arange(0, NV * BV)
    m_v = o_v < V
    p_out = out + row * (H * V) + i_h * V + o_v
    if slot < 0:
        tl.store(p_out, tl.zeros([NV * BV], dtype), mask=m_v)
        return
    # issue every load before the first value is used
    o_k = tl.arange(0, BK)[:, None]
    m_k = o_k < K
    i_head = slot * H + i_h
    p_state = recurrent_state + i_head * (K * V)
    p_held = recurrent_state
    if ROWS == 0:
        b_next = load_state(p_state, o_k, 0, m_k, held, V, BV)
    else:  # all rows are read, whatever they hold: to know takes as long as to read
        p_held = step_buffer + i_head * (ROWS * WIDTH)
        position, count = load_position(state_position + i_head, context, ROWS)
        o_c, o_key = tl.arange(0, BC)[:, None], tl.arange(0, BK)[None, :]
        b_gs = tl.load(p_held + K + V + tl.arange(0, BC) * WIDTH, mask=tl.arange(0, BC) < ROWS, other=0.0)
        b_held = tl.load(p_held + o_c * WIDTH + o_key, mask=(o_c < ROWS) & (o_key < K), other=0.0)
        b_deltas = tl.load(p_held + o_c * WIDTH + K + o_v[None, :], mask=(o_c < ROWS) & m_v[None, :], other=0.0)
    o_row = tl.arange(0, BK)[None, :]
    b_q = tl.load(q + row * stride_q + OFF_Q + i_h * K + o_row, mask=o_row < K, other=0.0)
    b_k = tl.load(k + row * stride_k + OFF_K + i_h * K + o_row, mask=o_row < K, other=0.0)
    b_beta, b_g = gates(
        beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, 0, 0, A_log, dt_bias, i_h, o_one, m_one,
        dtype, W > 0,
    )  # fmt: skip
    p_v = v + row * stride_v + OFF_V + i_h * V
    if W > 0:
        b_gate = tl.load(gate + row * stride_gate + OFF_Z + i_h * V + o_v, mask=m_v, other=0.0)
        b_w = tl.load(w_o + o_v, mask=m_v, other=0.0)
        p_kappa = kappa + row * stride_kappa + i_h * V * W
        p_conv = conv_state + slot * (CONV_ROWS * H * V) + i_h * V
        b_v = conv_tile(p_v, 0, p_kappa, 0, p_conv, o_one, m_one, 0, V, 0, context, H * V, W, CONV_ROWS, NV * BV, True)
        tl.debug_barrier()  # every thread has read the old conv_state
        if CONV_ROWS > W - 1:
            b_u = tl.load(p_v + o_v, mask=m_v, other=0.0)
            store_ring(p_conv, b_u[None, :], o_one, m_one, o_v, m_v, context, H * V, CONV_ROWS)
        else:
            shift_conv_state(p_conv, p_v + stride_v, stride_v, 1, o_v, m_v, held, H * V, W)
    else:
        b_v = tl.load(p_v + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_q = l2_normalise(b_q, W > 0) * (K**-0.5)
    b_k = l2_normalise(b_k, W > 0)
    b_qk = tl.sum(b_q * b_k, 1)[:, None]
    b_v = tl.reshape(b_v, [1, NV * BV])
    b_G = b_g
    append: tl.constexpr = False
    begun = held
    if ROWS > 0:
        append, begun = count + 1 < INTERVAL, held & (position > 0)
        m_c = tl.arange(0, BC) < count
        b_total, b_since = decays(b_gs, m_c)
        b_G = b_g + b_total
        b_since = b_since * tl.exp(tl.sum(b_g, 0))  # of each held token, this one's decay in it
        b_held = tl.where(m_c[:, None], b_held, 0.0) * b_since[:, None]
        b_deltas = tl.where(m_c[:, None], b_deltas, 0.0)
        b_v -= tl.sum(tl.sum(b_held * b_k, 1)[:, None] * b_deltas, 0)[None, :]
        b_more = tl.sum(tl.sum(b_held * b_q, 1)[:, None] * b_deltas, 0)[None, :]  # what is held adds to o
        p_token, p_query = p_held + count * WIDTH, query + (row * H + i_h) * K
        tl.debug_barrier()  # every thread has read the held tokens and the position
        if append:
            tl.store(p_token + o_row, b_k, mask=o_row < K)
            tl.store(p_token + K + V + o_one, b_g, mask=m_one)
            tl.store(p_query + o_row, b_q, mask=o_row < K)
        else:  # the tokens go into the state, their keys with what they weigh in it
            tl.store(p_held + o_c * WIDTH + o_key, b_held, mask=m_c[:, None] & (o_key < K))
        tl.store(state_position + i_head, tl.where(append, context - count, context + 1))
        tl.debug_barrier()
    b_decay, b_beta = tl.exp(b_G)[:, None], b_beta[:, None]

    if append:
        b_all_k, b_all_q = state_products(p_state, p_token, p_query, o_v, m_v, begun, K, V, BR)
        b_all = b_beta * (b_v - b_all_k[None, :] * b_decay)
        tl.store(p_token + K + o_v[None, :], b_all, mask=m_v[None, :])
        b_o = b_all_q[None, :] * b_decay + b_qk * b_all
    else:
        b_qc, b_kc = tl.reshape(b_q, [BK, 1]), tl.reshape(b_k, [BK, 1])
        b_vs = tl.reshape(b_v, [NV, BV])
        b_os = tl.zeros([NV, BV], tl.float32)
        o_tile = tl.arange(0, NV)[:, None]
        if ROWS > 0:
            b_next = load_state(p_state, o_k, 0, m_k, begun, V, BV)
        for i_tile in range(0, tl.cdiv(V, BV)):
            i_v = i_tile * BV
            b_state = b_next.to(tl.float32) * b_decay
            b_next = load_state(p_state, o_k, i_v + BV, m_k, begun, V, BV)
            b_vt = tl.sum(tl.where(o_tile == i_tile, b_vs, 0.0), 0)[None, :]
            b_both = tl.sum(tl.join(b_state * b_kc, b_state * b_qc), 0)  # one reduction
            b_state_k, b_state_q = tl.split(b_both)
            b_delta = b_beta * (b_vt - b_state_k[None, :])  # [1, BV]
            b_os = tl.where(o_tile == i_tile, b_state_q[None, :] + b_qk * b_delta, b_os)
            o_sv = i_v + tl.arange(0, BV)[None, :]
            if ROWS > 0:
                for j in range(0, count):
                    b_kn = tl.load(p_held + j * WIDTH + o_k, mask=m_k, other=0.0)
                    b_state += b_kn * tl.load(p_held + j * WIDTH + K + o_sv, mask=o_sv < V, other=0.0)
            b_state = (b_state + b_kc * b_delta).to(recurrent_state.dtype.element_ty)
            tl.store(p_state + o_k * V + o_sv, b_state, mask=m_k & (o_sv < V))
        b_o = tl.reshape(b_os, [1, NV * BV])
    if ROWS > 0:
        b_o += b_more
    if W > 0:
        b_o = gated_norm_tile(b_o, b_w.to(tl.float32)[None, :], b_gate.to(tl.float32)[None, :], eps, V)
    tl.store(p_out[None, :], b_o.to(dtype), mask=m_v[None, :])


def decode_config(state: Tensor, head_k_dim: int, head_v_dim: int, held: bool = False) -> dict:
    """Tiles of BV columns, from the table (configs.py): a row of 32 is 128 bytes of an fp32 state, 64 of a bf16 one.
    held: beside a step buffer."""
    use = lookup("delta_rule_decode", state_dtype=state.dtype, head_k_dim=head_k_dim, head_v_dim=head_v_dim, held=held)
    tiles = triton.next_power_of_2(triton.cdiv(head_v_dim, use["BV"]))
    return {"BK": triton.next_power_of_2(head_k_dim), "NV": tiles, **use}


def decode_delta_rule_triton(
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
    offsets: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0),
    conv: tuple[Tensor, Tensor] | None = None,
    raw_gates: tuple[Tensor, Tensor] | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    out: Tensor | None = None,
    buffer: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """o [T, H, V] in q's dtype, or with `norm` the gated norm of o; states are updated in place.

    Without `out` every sequence has one token. With `out` [T, H, V] the call is a mixed one: the rows of sequences of
    one token are written to it, the others stay as they are.

    `head_dims`: H, K, V; `offsets`: the first column of q, k, v, g, gate in the rows of their tensors. A JetBlock
    passes conv = (kappa, conv_state), raw_gates = (A_log, dt_bias) and norm = (w_o, gate, eps): q and k are then taken
    before SiLU, v is u, and beta and g are the projections b and a. `buffer`: step_buffer, state_position, interval."""
    H, K, V = head_dims
    step_buffer, state_position, interval = buffer or (recurrent_state, slots, 1)
    held = step_buffer.shape[2] if buffer else 0
    kappa, conv_state = conv or (q, q)
    A_log, dt_bias = raw_gates or (g, g)
    w_o, gate, eps = norm or (q, q, 0.0)
    W, conv_rows = (kappa.shape[1] // (H * V), conv_state.shape[1]) if conv else (0, 0)
    mixed = out is not None
    out = q.new_empty(q.shape[0], H, V) if out is None else out
    query = q.new_empty(q.shape[0], H, K, dtype=torch.float32) if buffer else q
    off_q, off_k, off_v, off_g, off_z = offsets
    wrap(decode_kernel)[(H, slots.shape[0])](
        q, k, v, beta, g, kappa, A_log, dt_bias, w_o, gate, conv_state, recurrent_state, step_buffer, state_position,
        query, out, cu_seqlens, slots, context_lens, q.shape[0], recurrent_state.shape[0],
        q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0), kappa.stride(0), gate.stride(0), eps,
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, OFF_Z=off_z, H=H, K=K, V=V, W=W, CONV_ROWS=conv_rows,
        ROWS=held, WIDTH=K + V + EXTRA, INTERVAL=interval, BC=triton.next_power_of_2(max(held, 1)), BR=8,
        MIXED=mixed, GDC=gdc(), **decode_config(recurrent_state, K, V, held > 0),
    )  # fmt: skip
    return out
