"""1 to BT tokens of each sequence, the last of which may be taken back: the first half of the form VERIFY.

The equations are those of gated_delta_rule_deferred.py. With the rows [kn | qn] as one matrix X of 2 BT rows they are
one unit lower triangular system, (I + L) [delta | o] = r, of products X X^T and X held^T; its inverse makes `fixed` and
`mix`. Products are in fp32 (three TF32 products on tensor cores), since the results stand for single steps.

A program owns a head's columns of V, of a sequence. What it needs of X it computes itself, so that a few sequences fill
the GPU: of many, a program takes several tiles of BV columns, with the same bits. With W > 0 the inputs are a
JetBlock's; conv_state is a ring there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.attention_decode import num_sms
from jet_export.kernels.common import await_inputs, gdc, sequence_bounds, silu, slot_of, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.dynamic_conv import conv_tile, store_ring
from jet_export.kernels.form import MAX_VERIFY
from jet_export.kernels.gated_delta_rule_chunk import gates, unit_lower_inverse
from jet_export.kernels.step_buffer import FEW_BYTES, ask_for_state, asked_bytes, decays, load_position


@triton.jit(do_not_specialize=["T", "S"])
def verify_inputs_kernel(
    q, k, v, beta, g, kappa, A_log, dt_bias, conv_state, recurrent_state, step_buffer, state_position, work, cu_seqlens,
    slots, context_lens, T, S, stride_q, stride_k, stride_v, stride_b, stride_g, stride_kappa,
    OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_V: tl.constexpr, OFF_G: tl.constexpr,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, RAW: tl.constexpr, W: tl.constexpr,
    CONV_ROWS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WORK: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, NK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BC: tl.constexpr, ASK: tl.constexpr, FEW: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    """Grid (programs of a head, H, N). R: the most tokens, BT: rounded up to 8 or 16; BC: ROWS rounded up, 16 or more.
    K is cut into NK blocks of BK, whose products different warps sum: so they fit the registers. ASK, FEW: BYTES and
    LIMIT of `ask_for_state`."""
    i_h = tl.program_id(1)
    i_hk = i_h // (H // HK)
    i_n = tl.program_id(2)
    head = slot_of(slots, i_n, S) * H + i_h
    asked = ask_for_state(recurrent_state, head, tl.program_id(0), tl.num_programs(0), tl.num_programs(2), H, ASK, FEW)
    i_n += await_inputs(GDC)
    slot = slot_of(slots, i_n, S)
    if slot < 0:
        return
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    context = tl.load(context_lens + i_n)
    i_head = slot * H + i_h
    o_k = tl.arange(0, NK)[:, None] * BK + tl.arange(0, BK)[None, :]
    _, count = load_position(state_position + i_head, context, ROWS)
    row = bos.to(tl.int64)
    o_r = tl.arange(0, 2 * BT)  # rows of X: the kn of BT tokens, then their qn
    o_t = o_r % BT
    is_k = o_r < BT
    m_t = o_t < tl.minimum(eos - bos, R)
    m_new = is_k & m_t
    m_k = (o_k < K)[:, None, :]
    p_q = q + asked + row * stride_q + OFF_Q + i_hk * K + o_t[None, :, None] * stride_q + o_k[:, None, :]
    p_k = k + row * stride_k + OFF_K + i_hk * K + o_t[None, :, None] * stride_k + o_k[:, None, :]
    b_q = tl.load(p_q, mask=m_k & (m_t & ~is_k)[None, :, None], other=0.0)
    b_k = tl.load(p_k, mask=m_k & m_new[None, :, None], other=0.0)
    b_beta, b_g = gates(
        beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, stride_b, stride_g, A_log, dt_bias, i_h,
        o_t, m_t, q.dtype.element_ty, RAW,
    )  # fmt: skip
    p_held = step_buffer + i_head * (ROWS * WIDTH)
    o_c = tl.arange(0, BC)
    m_c = o_c < count
    b_held = tl.load(p_held + o_c[None, :, None] * WIDTH + o_k[:, None, :], mask=m_c[None, :, None] & m_k, other=0.0)
    b_total, b_w = decays(tl.load(p_held + K + V + o_c * WIDTH, mask=m_c, other=0.0), m_c)

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
    b_eF = tl.exp(b_F)
    b_held_x = tl.sum(b_held_x, 0) * b_w[None, :] * b_eF[:, None]  # [2 BT, BC]

    p_x = work + (i_n.to(tl.int64) * H + i_h) * WORK
    o_y = tl.where(is_k, o_t, R + o_t)  # a row's place in work
    m_y = o_t < R
    if tl.program_id(0) == 0:
        tl.store(p_x + o_y[None, :, None] * K + o_k[:, None, :], b_x, mask=m_k & m_y[None, :, None])
        b_mix = b_solve * (tl.where(is_k, -b_beta, 1.0) * tl.exp(b_total) * b_eF)[None, :]
        p_mix = p_x + 2 * R * (K + V) + o_y[:, None] * (2 * R) + o_y[None, :]
        tl.store(p_mix, tl.where((m_t[:, None] & m_t[None, :]), b_mix, 0.0), mask=m_y[:, None] & m_y[None, :])
        p_g = p_x + 2 * R * (K + V + 2 * R)
        tl.store(p_g + o_t, b_g, mask=is_k & m_y)
        tl.store(p_g + R, 0.0)
    for i_v in range(tl.program_id(0) * BV, V, tl.num_programs(0) * BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < V
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
        b_base = tl.dot(b_held_x, b_deltas, input_precision=PRECISION)
        b_r = tl.where(m_new[:, None], b_beta[:, None] * (b_v - b_base), b_base)
        b_fixed = tl.dot(b_solve, b_r, input_precision=PRECISION)
        p_fixed = p_x + 2 * R * K + o_y[:, None] * V + o_v[None, :]
        tl.store(p_fixed, tl.where(m_t[:, None], b_fixed, 0.0), mask=m_y[:, None] & m_v[None, :])
        if W > 0:
            tl.debug_barrier()  # every thread has read the ring's rows
            store_ring(p_conv, b_u, o_t, m_new, o_v, m_v, context, H * V, CONV_ROWS)


def programs_of_a_head(N, num_heads: int, tiles: int, sms: int):
    """Programs that share a head's tiles or groups; N may be symbolic. Two a multiprocessor, if there are enough."""
    return torch.sym_max(1, torch.sym_min(tiles, 2 * sms // (N * num_heads)))


def verify_inputs_triton(
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
    key_heads: int,
) -> None:
    """Launches `verify_inputs_kernel`. Arguments as `deferred_delta_rule_triton`; work: [N, H, WORK]."""
    T, N, (H, K, V) = q.shape[0], slots.shape[0], head_dims
    step_buffer, state_position, interval = buffer
    kappa, conv_state = conv or (q, q)
    A_log, dt_bias = raw_gates or (g, g)
    W, conv_rows = (kappa.shape[1] // (H * V), conv_state.shape[1]) if conv else (0, 0)
    held = step_buffer.shape[2]
    tokens = held - interval + 1
    use = lookup("delta_rule_verify", head_k_dim=K, head_v_dim=V)
    BK = triton.next_power_of_2(K)
    off_q, off_k, off_v, off_g, _ = offsets
    wrap(verify_inputs_kernel)[(programs_of_a_head(N, H, triton.cdiv(V, use["BV"]), num_sms(q.device)), H, N)](
        q, k, v, beta, g, kappa, A_log, dt_bias, conv_state, recurrent_state, step_buffer, state_position, work,
        cu_seqlens, slots, context_lens, T, step_buffer.shape[0],
        q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0), kappa.stride(0),
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, H=H, HK=key_heads or H, K=K, V=V,
        RAW=raw_gates is not None, W=W, CONV_ROWS=conv_rows, ROWS=held,
        WIDTH=step_buffer.shape[3], WORK=work.shape[2], R=tokens, PRECISION="tf32x3",
        BT=8 if tokens <= 8 else MAX_VERIFY, NK=max(1, BK // 32), BK=min(32, max(16, BK)),
        BC=max(16, triton.next_power_of_2(held)), ASK=asked_bytes(recurrent_state), FEW=FEW_BYTES,
        GDC=gdc(), **use,
    )  # fmt: skip
