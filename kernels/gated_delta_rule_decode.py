"""One decode step of the gated delta rule for N sequences: equations in gated_delta_rule.py, one launch.

A program owns one (head, sequence). It streams the state [K, V] through registers in tiles of BV columns, reads and
writes every element once, and prefetches the next tile. Both products with the state are taken before the update:
o = exp(g) state^T qn + (qn . kn) delta. With W > 0 it is a whole JetBlock step: the inputs are the raw projections, and
the kernel also applies SiLU, the dynamic convolution (shifting conv_state), the gates and the gated norm over the head.
With MIXED the sequences may be longer: those of one token are stepped, the others are left to the chunk kernels.

`decode_inputs_kernel` is the first half of a step on a state that is written every few tokens, where everything is
known but the state: gated_delta_rule_deferred.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import await_inputs, gdc, sequence_bounds, slot_of, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.dynamic_conv import conv_tile, shift_conv_state, store_ring
from jet_export.kernels.gated_delta_rule_chunk import gates, l2_normalise
from jet_export.kernels.gated_rms_norm import empty_out, gated_norm_tile, rounded
from jet_export.kernels.step_buffer import FEW_BYTES, ask_for_state, asked_bytes, decays, load_position


@triton.jit
def load_state(p_state, o_k, i_v, m_k, held, V: tl.constexpr, BV: tl.constexpr):
    """Columns i_v + [0, BV) of the state, in the pool's dtype."""
    o_v = i_v + tl.arange(0, BV)
    return tl.load(p_state + o_k * V + o_v[None, :], mask=m_k & held & (o_v < V)[None, :], other=0.0)


@triton.jit
def token_key(
    p_q, p_k, p_beta, p_g, A_log, dt_bias, i_h, dtype: tl.constexpr,
    K: tl.constexpr, RAW: tl.constexpr, JET: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """qn, kn [1, BK], beta and g [1] of one token of a head, fp32. RAW: beta and g come from b and a. JET: q and k do
    from a JetBlock's projections."""
    o_row = tl.arange(0, BK)[None, :]
    o_one = tl.arange(0, 1)
    b_q = tl.load(p_q + o_row, mask=o_row < K, other=0.0)
    b_k = tl.load(p_k + o_row, mask=o_row < K, other=0.0)
    b_beta, b_g = gates(p_beta, p_g, 0, 0, A_log, dt_bias, i_h, o_one, o_one < 1, dtype, RAW)
    return l2_normalise(b_q, JET) * (K**-0.5), l2_normalise(b_k, JET), b_beta, b_g


@triton.jit
def token_value(
    p_v, p_kappa, p_conv, stride_v, i_v, context,
    H: tl.constexpr, V: tl.constexpr, W: tl.constexpr, CONV_ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """v [BV] of one token of a head, fp32, columns i_v + [0, BV). W > 0: it comes from a JetBlock's projection u, which
    conv_state takes."""
    o_v = i_v + tl.arange(0, BV)
    m_v = o_v < V
    if W > 0:
        o_one = tl.arange(0, 1)
        m_one = o_one < 1
        b_v = conv_tile(p_v, 0, p_kappa, 0, p_conv, o_one, m_one, i_v, V, 0, context, H * V, W, CONV_ROWS, BV, True)
        tl.debug_barrier()  # every thread has read the old conv_state
        if CONV_ROWS > W - 1:
            b_u = tl.load(p_v + o_v, mask=m_v, other=0.0)
            store_ring(p_conv, b_u[None, :], o_one, m_one, o_v, m_v, context, H * V, CONV_ROWS)
        else:
            shift_conv_state(p_conv, p_v + stride_v, stride_v, 1, o_v, m_v, context > 0, H * V, W)
        b_v = tl.reshape(b_v, [BV])
    else:
        b_v = tl.load(p_v + o_v, mask=m_v, other=0.0).to(tl.float32)
    return b_v


@triton.jit(do_not_specialize=["T", "S"])
def decode_kernel(
    q, k, v, beta, g, kappa, A_log, dt_bias, w_o, gate, out_scale, conv_state, recurrent_state, out, cu_seqlens, slots,
    context_lens, T, S, stride_q, stride_k, stride_v, stride_b, stride_g, stride_kappa, stride_gate, eps,
    OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_V: tl.constexpr, OFF_G: tl.constexpr, OFF_Z: tl.constexpr,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, RAW: tl.constexpr, NORM: tl.constexpr,
    W: tl.constexpr, CONV_ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    MIXED: tl.constexpr, CODES: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    """Grid (H, N). OFF_*: the first column of q, k, v (u), g (a), gate in the rows of their tensors. HK: heads of q, k.

    NV: the number of V tiles, rounded up to a power of two."""
    i_h = tl.program_id(0)
    i_hk = i_h // (H // HK)
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
    dtype: tl.constexpr = q.dtype.element_ty
    o_v = tl.arange(0, NV * BV)
    m_v = o_v < V
    p_out = out + row * (H * V) + i_h * V + o_v
    if slot < 0:
        tl.store(p_out, tl.zeros([NV * BV], out.dtype.element_ty), mask=m_v)
        return
    # issue every load before the first value is used
    o_k = tl.arange(0, BK)[:, None]
    m_k = o_k < K
    p_state = recurrent_state + (slot * H + i_h) * (K * V)
    b_next = load_state(p_state, o_k, 0, m_k, held, V, BV)
    if NORM:
        b_gate = tl.load(gate + row * stride_gate + OFF_Z + i_h * V + o_v, mask=m_v, other=0.0)
        b_w = tl.load(w_o + o_v, mask=m_v, other=0.0)
    scale = 1.0
    if CODES:
        scale = tl.load(out_scale)
    b_q, b_k, b_beta, b_g = token_key(
        q + row * stride_q + OFF_Q + i_hk * K, k + row * stride_k + OFF_K + i_hk * K, beta + row * stride_b + i_h,
        g + row * stride_g + OFF_G + i_h, A_log, dt_bias, i_h, dtype, K, RAW, W > 0, BK,
    )  # fmt: skip
    b_v = token_value(
        v + row * stride_v + OFF_V + i_h * V, kappa + row * stride_kappa + i_h * V * W,
        conv_state + slot * (CONV_ROWS * H * V) + i_h * V, stride_v, 0, context, H, V, W, CONV_ROWS, NV * BV,
    )  # fmt: skip
    b_qk = tl.sum(b_q * b_k, 1)[:, None]
    b_decay, b_beta = tl.exp(b_g)[:, None], b_beta[:, None]
    b_qc, b_kc = tl.reshape(b_q, [BK, 1]), tl.reshape(b_k, [BK, 1])
    b_vs = tl.reshape(b_v, [NV, BV])
    b_os = tl.zeros([NV, BV], tl.float32)
    o_tile = tl.arange(0, NV)[:, None]
    for i_tile in range(0, tl.cdiv(V, BV)):
        i_v = i_tile * BV
        b_state = b_next.to(tl.float32) * b_decay
        b_next = load_state(p_state, o_k, i_v + BV, m_k, held, V, BV)
        b_vt = tl.sum(tl.where(o_tile == i_tile, b_vs, 0.0), 0)[None, :]
        b_both = tl.sum(tl.join(b_state * b_kc, b_state * b_qc), 0)  # one reduction
        b_state_k, b_state_q = tl.split(b_both)
        b_delta = b_beta * (b_vt - b_state_k[None, :])  # [1, BV]
        b_os = tl.where(o_tile == i_tile, b_state_q[None, :] + b_qk * b_delta, b_os)
        o_sv = i_v + tl.arange(0, BV)[None, :]
        b_state = (b_state + b_kc * b_delta).to(recurrent_state.dtype.element_ty)
        tl.store(p_state + o_k * V + o_sv, b_state, mask=m_k & (o_sv < V))
    b_o = tl.reshape(b_os, [1, NV * BV])
    if NORM:
        b_o = gated_norm_tile(b_o, b_w.to(tl.float32)[None, :], b_gate.to(tl.float32)[None, :], eps, V)
    tl.store(p_out[None, :], rounded(b_o, scale, dtype, CODES), mask=m_v[None, :])


@triton.jit(do_not_specialize=["T", "S"])
def decode_inputs_kernel(
    q, k, v, beta, g, kappa, A_log, dt_bias, conv_state, recurrent_state, step_buffer, state_position, work, cu_seqlens,
    slots, context_lens, T, S, stride_q, stride_k, stride_v, stride_b, stride_g, stride_kappa,
    OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_V: tl.constexpr, OFF_G: tl.constexpr,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, RAW: tl.constexpr, W: tl.constexpr,
    CONV_ROWS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WORK: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BC: tl.constexpr, MIXED: tl.constexpr, ASK: tl.constexpr, FEW: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    """Grid (H, N). Of one token: what `deferred_step_kernel` needs, into `work`, BV columns of V at a time. BC: ROWS,
    those of step_buffer, rounded up. ASK, FEW: BYTES and LIMIT of `ask_for_state`."""
    i_h = tl.program_id(0)
    i_hk = i_h // (H // HK)
    i_n = tl.program_id(1)
    asked = ask_for_state(recurrent_state, slot_of(slots, i_n, S) * H + i_h, 0, 1, tl.num_programs(1), H, ASK, FEW)
    i_n += await_inputs(GDC)
    slot = slot_of(slots, i_n, S)
    context = tl.load(context_lens + i_n)
    row = i_n.to(tl.int64)
    if MIXED:
        bos, eos = sequence_bounds(cu_seqlens, i_n, T)
        if eos - bos != 1:
            return
        row = bos.to(tl.int64)
    if slot < 0:
        return
    i_head = slot * H + i_h
    p_held = step_buffer + i_head * (ROWS * WIDTH)
    _, count = load_position(state_position + i_head, context, ROWS)
    o_c, o_k = tl.arange(0, BC), tl.arange(0, BK)[None, :]
    m_c = o_c < count
    b_gs = tl.load(p_held + K + V + o_c * WIDTH, mask=m_c, other=0.0)
    b_held = tl.load(p_held + o_c[:, None] * WIDTH + o_k, mask=m_c[:, None] & (o_k < K), other=0.0)
    b_q, b_k, b_beta, b_g = token_key(
        q + row * stride_q + OFF_Q + i_hk * K + asked, k + row * stride_k + OFF_K + i_hk * K,
        beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, A_log, dt_bias, i_h, q.dtype.element_ty, K, RAW,
        W > 0, BK,
    )  # fmt: skip
    b_total, b_since = decays(b_gs, m_c)
    b_weight = b_since * tl.exp(tl.sum(b_g, 0))  # of each held token in this one
    b_kc, b_qc = tl.sum(b_held * b_k, 1) * b_weight, tl.sum(b_held * b_q, 1) * b_weight
    b_qk = tl.sum(b_q * b_k, 1)  # [1]
    b_decay = tl.exp(b_g + b_total)
    p_x = work + (i_n.to(tl.int64) * H + i_h) * WORK
    p_mix = p_x + 2 * (K + V) + tl.arange(0, 1)
    tl.store(p_x + o_k, b_k, mask=o_k < K)
    tl.store(p_x + K + o_k, b_q, mask=o_k < K)
    tl.store(p_mix, -b_beta * b_decay)
    tl.store(p_mix + 2, -b_qk * b_beta * b_decay)
    tl.store(p_mix + 3, b_decay)
    tl.store(p_mix + 4, b_g)
    tl.store(p_mix + 5, tl.zeros([1], tl.float32))
    for i_v in range(0, V, BV):  # in tiles, so that registers are few and programs many
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < V
        p_deltas = p_held + o_c[:, None] * WIDTH + K + o_v[None, :]
        b_deltas = tl.load(p_deltas, mask=m_c[:, None] & m_v[None, :], other=0.0)
        b_v = token_value(
            v + row * stride_v + OFF_V + i_h * V, kappa + row * stride_kappa + i_h * V * W,
            conv_state + slot * (CONV_ROWS * H * V) + i_h * V, stride_v, i_v, context, H, V, W, CONV_ROWS, BV,
        )  # fmt: skip
        b_delta = b_beta * (b_v - tl.sum(b_kc[:, None] * b_deltas, 0))
        tl.store(p_x + 2 * K + o_v, b_delta, mask=m_v)
        tl.store(p_x + 2 * K + V + o_v, tl.sum(b_qc[:, None] * b_deltas, 0) + b_qk * b_delta, mask=m_v)


def decode_config(state: Tensor, head_k_dim: int, head_v_dim: int) -> dict:
    """Tiles of BV columns, from the table (configs.py): a row of 32 is 128 bytes of an fp32 state, 64 of a bf16 one."""
    use = lookup("delta_rule_decode", state_dtype=state.dtype, head_k_dim=head_k_dim, head_v_dim=head_v_dim)
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
    key_heads: int = 0,
    out_scale: Tensor | None = None,
) -> Tensor:
    """o [T, H, V] in q's dtype, or with `norm` the gated norm of o; states are updated in place.

    Without `out` every sequence has one token. With `out` [T, H, V] the call is a mixed one: the rows of sequences of
    one token are written to it, the others stay as they are.

    `head_dims`: H, K, V; `offsets`: the first column of q, k, v, g, gate in the rows of their tensors; `key_heads`: the
    heads of q and k, if not H. A JetBlock passes conv = (kappa, conv_state), raw_gates = (A_log, dt_bias) and norm =
    (w_o, gate, eps): q and k are then taken before SiLU, v is u, and beta and g are the projections b and a. A Gated
    DeltaNet passes the last two. With out_scale [1] the result is codes (gated_rms_norm.py)."""
    H, K, V = head_dims
    kappa, conv_state = conv or (q, q)
    A_log, dt_bias = raw_gates or (g, g)
    w_o, gate, eps = norm or (q, q, 0.0)
    W, conv_rows = (kappa.shape[1] // (H * V), conv_state.shape[1]) if conv else (0, 0)
    mixed = out is not None
    out = empty_out(q, (q.shape[0], H, V), out_scale) if out is None else out
    off_q, off_k, off_v, off_g, off_z = offsets
    wrap(decode_kernel)[(H, slots.shape[0])](
        q, k, v, beta, g, kappa, A_log, dt_bias, w_o, gate, w_o if out_scale is None else out_scale, conv_state,
        recurrent_state, out, cu_seqlens, slots, context_lens, q.shape[0], recurrent_state.shape[0],
        q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0), kappa.stride(0), gate.stride(0), eps,
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, OFF_Z=off_z, H=H, HK=key_heads or H, K=K, V=V,
        RAW=raw_gates is not None, NORM=norm is not None, W=W, CONV_ROWS=conv_rows,
        MIXED=mixed, CODES=out_scale is not None, GDC=gdc(), **decode_config(recurrent_state, K, V),
    )  # fmt: skip
    return out


def decode_inputs_triton(
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
    work: Tensor,
    offsets: tuple[int, int, int, int, int],
    conv: tuple[Tensor, Tensor] | None,
    raw_gates: tuple[Tensor, Tensor] | None,
    mixed: bool,
    key_heads: int,
) -> None:
    """Launches `decode_inputs_kernel`. Arguments as `deferred_delta_rule_triton`; work: [N, H, WORK]."""
    H, K, V = head_dims
    step_buffer, state_position, _ = buffer
    kappa, conv_state = conv or (q, q)
    A_log, dt_bias = raw_gates or (g, g)
    W, conv_rows = (kappa.shape[1] // (H * V), conv_state.shape[1]) if conv else (0, 0)
    off_q, off_k, off_v, off_g, _ = offsets
    held = step_buffer.shape[2]
    wrap(decode_inputs_kernel)[(H, slots.shape[0])](
        q, k, v, beta, g, kappa, A_log, dt_bias, conv_state, recurrent_state, step_buffer, state_position, work,
        cu_seqlens, slots, context_lens, q.shape[0], step_buffer.shape[0],
        q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0), kappa.stride(0),
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, H=H, HK=key_heads or H, K=K, V=V,
        RAW=raw_gates is not None, W=W, CONV_ROWS=conv_rows, ROWS=held,
        WIDTH=step_buffer.shape[3], WORK=work.shape[2], BK=triton.next_power_of_2(K),
        BC=triton.next_power_of_2(held), MIXED=mixed,
        ASK=asked_bytes(recurrent_state), FEW=FEW_BYTES, GDC=gdc(),
        **lookup("delta_rule_inputs", head_k_dim=K, head_v_dim=V),
    )  # fmt: skip
