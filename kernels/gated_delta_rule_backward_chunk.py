"""The backward kernels of the gated delta rule that see one chunk each; equations in gated_delta_rule_torch.py.

`chunk_pairs_kernel`, parallel over (head, chunk): the [BT, BT] gradients dP D and B, and what they add to dbeta and dG.
`chunk_qk_kernel`, parallel over (K tile, head, chunk): dqn and dkn, and what the states add to dbeta, dG and dG_last.
It is a kernel of its own so that it can load dP^T and B^T: see gated_delta_rule_backward.py on transposed accumulators.
"""

import triton
import triton.language as tl

from jet_export.kernels.common import find_chunk
from jet_export.kernels.gated_delta_rule_chunk import load_tile


@triton.jit(do_not_specialize=["N", "T"])
def chunk_pairs_kernel(
    q_n, k_n, gates, v, v_new, do, dy, d_attn, d_A, d_beta, d_G, cu_seqlens, N, T, stride_v, stride_do,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (H, chunks). d_attn = dP D and d_A = B [T, H, BT]; d_beta, d_G [T, H]: the parts without states."""
    i_h = tl.program_id(0)
    i_c = tl.program_id(1)
    _, bos, eos, i_t = find_chunk(cu_seqlens, i_c, N, T, BT)
    if (i_t < bos) | (i_t >= eos):
        return
    dtype: tl.constexpr = q_n.dtype.element_ty
    i_t = i_t.to(tl.int64)
    n_t = eos - i_t
    row = i_t * H + i_h
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    b_dP = tl.zeros([BT, BT], tl.float32)
    b_dA = tl.zeros([BT, BT], tl.float32)
    b_dbeta = tl.zeros([BT], tl.float32)
    for i_v in range(0, V, BV):
        n_v = V - i_v
        b_v = load_tile(v + i_t * stride_v + i_h * V + i_v, o_t, o_v, stride_v, n_t, n_v, True, V % BV != 0)
        b_do = load_tile(do + i_t * stride_do + i_h * V + i_v, o_t, o_v, stride_do, n_t, n_v, True, V % BV != 0)
        b_vn = load_tile(v_new + row * V + i_v, o_t, o_v, H * V, n_t, n_v, True, V % BV != 0)
        b_dy = load_tile(dy + row * V + i_v, o_t, o_v, H * V, n_t, n_v, True, V % BV != 0)
        b_dP = tl.dot(b_do, tl.trans(b_vn), acc=b_dP, input_precision=PRECISION)
        b_dA = tl.dot(b_dy, tl.trans(b_vn), acc=b_dA, input_precision=PRECISION)
        b_dbeta += tl.sum(b_dy.to(tl.float32) * b_v.to(tl.float32), 1)
    b_qk = tl.zeros([BT, BT], tl.float32)
    b_kk = tl.zeros([BT, BT], tl.float32)
    for i_k in range(0, K, BK):
        b_q = load_tile(q_n + row * K + i_k, o_t, o_k, H * K, n_t, K - i_k, True, K % BK != 0)
        b_k = load_tile(k_n + row * K + i_k, o_t, o_k, H * K, n_t, K - i_k, True, K % BK != 0)
        b_qk = tl.dot(b_q, tl.trans(b_k), acc=b_qk, input_precision=PRECISION)
        b_kk = tl.dot(b_k, tl.trans(b_k), acc=b_kk, input_precision=PRECISION)
    p_gates = gates + (i_c.to(tl.int64) * H + i_h) * (4 * BT) + o_t
    b_G = tl.load(p_gates)
    b_beta = tl.load(p_gates + 3 * BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    b_decay = tl.exp(tl.where(o_i >= o_j, b_G[:, None] - b_G[None, :], 0.0))
    b_dP = tl.where(o_i >= o_j, b_dP * b_decay, 0.0)
    b_dA = tl.where(o_i > o_j, -b_dA * b_decay, 0.0)
    b_dbeta += tl.sum(b_dA * b_kk, 1)
    b_dA *= b_beta[:, None]
    b_pairs = b_dP * b_qk + b_dA * b_kk
    m_t = o_t < n_t
    tl.store(d_beta + row + o_t * H, b_dbeta, mask=m_t)
    tl.store(d_G + row + o_t * H, tl.sum(b_pairs, 1) - tl.sum(b_pairs, 0), mask=m_t)
    o_tt = row * BT + o_i * (H * BT) + o_j
    tl.store(d_attn + o_tt, b_dP.to(dtype), mask=m_t[:, None])
    tl.store(d_A + o_tt, b_dA.to(dtype), mask=m_t[:, None])


@triton.jit(do_not_specialize=["N", "T", "M"])
def chunk_qk_kernel(
    q_n, k_n, gates, v_new, states, do, dy, d_states, d_attn, d_A, d_qn, d_kn, part_beta, part_G, part_last,
    cu_seqlens, N, T, M, stride_do,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (K tiles, H, M chunks). d_qn, d_kn [T, H, K] fp32; part_beta, part_G [K tiles, T, H], part_last
    [K tiles, M, H]: what this tile of K adds to dbeta, dG and dG_last."""
    i_k = tl.program_id(0)
    i_h = tl.program_id(1)
    i_c = tl.program_id(2)
    _, bos, eos, i_t = find_chunk(cu_seqlens, i_c, N, T, BT)
    if (i_t < bos) | (i_t >= eos):
        return
    i_t = i_t.to(tl.int64)
    n_t = eos - i_t
    row, i_chunk = i_t * H + i_h, i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    n_k = K - i_k * BK
    b_do_S = tl.zeros([BT, BK], tl.float32)
    b_dy_S = tl.zeros([BT, BK], tl.float32)
    b_v_dS = tl.zeros([BT, BK], tl.float32)
    b_last = tl.zeros([BK], tl.float32)
    for i_v in range(0, V, BV):
        n_v = V - i_v
        o_S = i_chunk * (K * V) + i_v * K + i_k * BK
        b_do = load_tile(do + i_t * stride_do + i_h * V + i_v, o_t, o_v, stride_do, n_t, n_v, True, V % BV != 0)
        b_dy = load_tile(dy + row * V + i_v, o_t, o_v, H * V, n_t, n_v, True, V % BV != 0)
        b_vn = load_tile(v_new + row * V + i_v, o_t, o_v, H * V, n_t, n_v, True, V % BV != 0)
        b_S = load_tile(states + o_S, o_v, o_k, K, n_v, n_k, V % BV != 0, K % BK != 0)  # [BV, BK]
        b_dS = load_tile(d_states + o_S, o_v, o_k, K, n_v, n_k, V % BV != 0, K % BK != 0)
        b_do_S = tl.dot(b_do, b_S, acc=b_do_S, input_precision=PRECISION)
        b_dy_S = tl.dot(b_dy, b_S, acc=b_dy_S, input_precision=PRECISION)
        b_v_dS = tl.dot(b_vn, b_dS, acc=b_v_dS, input_precision=PRECISION)
        b_last += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 0)
    p_gates = gates + i_chunk * (4 * BT) + o_t
    b_E = tl.load(p_gates + BT)
    b_F = tl.load(p_gates + 2 * BT)
    b_beta = tl.load(p_gates + 3 * BT)
    keep = tl.load(gates + i_chunk * (4 * BT) + 2 * BT - 1)
    b_q = load_tile(q_n + row * K + i_k * BK, o_t, o_k, H * K, n_t, n_k, True, K % BK != 0)
    b_k = load_tile(k_n + row * K + i_k * BK, o_t, o_k, H * K, n_t, n_k, True, K % BK != 0)
    b_do_S *= b_E[:, None]
    b_dy_S *= b_E[:, None]
    b_v_dS *= b_F[:, None]
    b_k_dy_S = tl.sum(b_k.to(tl.float32) * b_dy_S, 1)
    b_leaving = tl.sum(b_k.to(tl.float32) * b_v_dS, 1)
    b_dG = tl.sum(b_q.to(tl.float32) * b_do_S, 1) - b_beta * b_k_dy_S - b_leaving
    m_t = o_t < n_t
    o_part = i_k.to(tl.int64) * T * H + row + o_t * H
    tl.store(part_beta + o_part, -b_k_dy_S, mask=m_t)
    tl.store(part_G + o_part, b_dG, mask=m_t)
    tl.store(part_last + i_k.to(tl.int64) * M * H + i_chunk, tl.sum(b_leaving, 0) + keep * tl.sum(b_last, 0))

    o_i, o_j = o_t[:, None], o_t[None, :]
    p_down = row * BT + o_i * (H * BT) + o_j  # [i, j]
    p_up = row * BT + o_i + o_j * (H * BT)  # [j, i]
    b_B = tl.load(d_A + p_down, mask=m_t[:, None], other=0.0)
    b_Bt = tl.load(d_A + p_up, mask=m_t[None, :], other=0.0)
    b_dP = tl.load(d_attn + p_down, mask=m_t[:, None], other=0.0)
    b_dPt = tl.load(d_attn + p_up, mask=m_t[None, :], other=0.0)
    b_dq = tl.dot(b_dP, b_k, acc=b_do_S, input_precision=PRECISION)
    b_dk = tl.dot(b_dPt, b_q, acc=b_v_dS - b_beta[:, None] * b_dy_S, input_precision=PRECISION)
    b_dk = tl.dot(b_B, b_k, acc=b_dk, input_precision=PRECISION)
    b_dk = tl.dot(b_Bt, b_k, acc=b_dk, input_precision=PRECISION)
    o_out = row * K + i_k * BK + o_t[:, None] * (H * K) + o_k[None, :]
    m_out = m_t[:, None] & (o_k < n_k)[None, :]
    tl.store(d_qn + o_out, b_dq, mask=m_out)
    tl.store(d_kn + o_out, b_dk, mask=m_out)
